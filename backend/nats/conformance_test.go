package nats_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	natsgo "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/nats"
	"github.com/dchannel/dchannel/conformance"
	"github.com/dchannel/dchannel/internal/faultproxy"
	"github.com/dchannel/dchannel/internal/testserver"
)

// suite is one server, and a connection and a proxy for every backend.
type suite struct {
	server *testserver.Server

	mu    sync.Mutex
	ways  map[dchannel.Backend]way
	admin *natsgo.Conn
}

type way struct {
	conn  *natsgo.Conn
	proxy *faultproxy.Proxy
}

func TestConformance(t *testing.T) {
	s := &suite{server: testserver.NATSForTest(t, testserver.NATSConfig{}), ways: map[dchannel.Backend]way{}}
	s.admin = connect(t, s.server.URL())
	const probe = 200 * time.Millisecond
	conformance.Run(t, conformance.Harness{
		New: func(t testing.TB) dchannel.Backend { return s.backend(t, nats.WithProbe(probe, probe)) },
		Short: &conformance.Short{
			New: func(t testing.TB) dchannel.Backend {
				return s.backend(t, nats.WithNamespace("short"), nats.WithProbe(probe, probe),
					nats.WithRetention(50, 3*time.Second), nats.WithIdleExpiry(time.Second))
			},
			Messages: 50, Retention: 3 * time.Second, Gone: 6 * time.Second,
		},
		Cut: func(t testing.TB, b dchannel.Backend) func() {
			p := s.way(b).proxy
			require.NoError(t, p.Refuse(true))
			p.Cut()
			return func() { require.NoError(t, p.Heal()) }
		},
		Blackhole: func(t testing.TB, b dchannel.Backend) func() {
			p := s.way(b).proxy
			p.Blackhole(faultproxy.Both)
			return func() { require.NoError(t, p.Heal()) }
		},
		LoseReply: func(t testing.TB, b dchannel.Backend, channel string) {
			s.way(b).proxy.CutBeforeReplyFunc([]byte("dchannel.log."), func(reply []byte) bool { return bytes.Contains(reply, []byte(`"seq":`)) })
		},
		Pause: func(t testing.TB) func() {
			require.NoError(t, s.server.Pause())
			return func() { require.NoError(t, s.server.Resume()) }
		},
		Restart: func(t testing.TB, kill bool) func() {
			if kill {
				require.NoError(t, s.server.Kill())
			} else {
				require.NoError(t, s.server.Stop())
			}
			return func() { require.NoError(t, s.server.Restart(within(t))) }
		},
		LoseState: func(t testing.TB) {
			require.NoError(t, s.server.Kill())
			require.NoError(t, s.server.Wipe())
			require.NoError(t, s.server.Restart(within(t)))
		},
		Upstreams: func(t testing.TB, channel string) int {
			var subs struct {
				List []struct{ Subject string } `json:"subscriptions_list"`
			}
			s.page(t, "/subsz?subs=1&limit=100000", &subs)
			n := 0
			for _, sub := range subs.List {
				if strings.HasSuffix(sub.Subject, ".push."+channel) {
					n++
				}
			}
			return n
		},
		Connections: func(t testing.TB, b dchannel.Backend) int { return s.way(b).proxy.Connections() },
		Calls: func(t testing.TB) int {
			var v struct {
				In int `json:"in_msgs"`
			}
			s.page(t, "/varz", &v)
			return v.In
		},
		Holds: func(t testing.TB, channel string) (held []string) {
			for _, ns := range []string{"dchannel", "short"} {
				m, err := s.admin.Request("$JS.API.STREAM.INFO."+ns, fmt.Appendf(nil, `{"subjects_filter":%q}`, ns+".log."+channel), patience)
				require.NoError(t, err)
				var info struct {
					State struct{ Subjects map[string]int }
				}
				require.NoError(t, json.Unmarshal(m.Data, &info))
				for subject, n := range info.State.Subjects {
					held = append(held, fmt.Sprint(subject, " ", n))
				}
			}
			return held
		},
		Eternal:    s.eternal,
		ProbeEvery: probe,
	})
}

// eternal names the messages without a time to live, except a stream's incarnation.
func (s *suite) eternal(t testing.TB) (found []string) {
	js, err := jetstream.New(s.admin)
	require.NoError(t, err)
	for stream := range js.ListStreams(within(t)).Info() {
		c, err := js.CreateConsumer(within(t), stream.Config.Name, jetstream.ConsumerConfig{HeadersOnly: true, AckPolicy: jetstream.AckNonePolicy})
		require.NoError(t, err)
		n := int(c.CachedInfo().NumPending)
		if n == 0 {
			continue
		}
		batch, err := c.Fetch(n, jetstream.FetchMaxWait(patience))
		require.NoError(t, err)
		for m := range batch.Messages() {
			if n--; m.Headers().Get("Nats-TTL") == "" && m.Subject() != stream.Config.Name+".meta.incarnation" {
				found = append(found, m.Subject())
			}
			if n == 0 {
				break
			}
		}
		require.NoError(t, js.DeleteConsumer(within(t), stream.Config.Name, c.CachedInfo().Name))
	}
	return found
}

func (s *suite) page(t testing.TB, path string, to any) {
	t.Helper()
	r, err := http.Get(s.server.NATSMonitor() + path)
	require.NoError(t, err)
	defer r.Body.Close()
	require.NoError(t, json.NewDecoder(r.Body).Decode(to))
	http.DefaultClient.CloseIdleConnections()
}

func (s *suite) backend(t testing.TB, opts ...nats.Option) dchannel.Backend {
	p, err := faultproxy.New(s.server.Addr())
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, p.Close()) })
	conn := connect(t, "nats://"+p.Addr(), natsgo.Timeout(500*time.Millisecond))
	b := nats.New(conn, opts...)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ways[b] = way{conn, p}
	return b
}

func (s *suite) way(b dchannel.Backend) way {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ways[b]
}
