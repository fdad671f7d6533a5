package etcd_test

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/etcd"
	"github.com/dchannel/dchannel/conformance"
	"github.com/dchannel/dchannel/internal/faultproxy"
	"github.com/dchannel/dchannel/internal/testserver"
)

// suite is one server, and a client and a proxy for every backend.
type suite struct {
	server *testserver.Server
	direct *clientv3.Client

	mu   sync.Mutex
	ways map[dchannel.Backend]*way
}

// way is how a backend reaches the server.
type way struct {
	t     testing.TB // the case's
	proxy *faultproxy.Proxy

	mu       sync.Mutex
	watchers int // on the server, made by this client
}

func TestConformance(t *testing.T) {
	s := &suite{server: testserver.EtcdForTest(t, testserver.EtcdConfig{}), ways: map[dchannel.Backend]*way{}}
	s.direct = connect(t, s.server.URL())
	const probe = 300 * time.Millisecond
	connect := func(opts ...etcd.Option) func(t testing.TB) dchannel.Backend {
		return func(t testing.TB) dchannel.Backend {
			return s.backend(t, append([]etcd.Option{etcd.WithProbe(probe, probe)}, opts...)...)
		}
	}
	conformance.Run(t, conformance.Harness{
		New: connect(),
		// etcd looks for expired leases every half a second, and a backend's leases are
		// used for a quarter of their time.
		Short: &conformance.Short{
			New: connect(etcd.WithNamespace("short"), etcd.WithRetention(50, 3*time.Second), etcd.WithIdleExpiry(time.Second)),
			Few: connect(etcd.WithNamespace("few"), etcd.WithRetention(50, time.Hour)),

			Messages: 50, Retention: 3 * time.Second, Gone: 15 * time.Second,
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
			before := s.revision(t, channel)
			s.way(b).proxy.CutBeforeReplyFunc([]byte("dchannel/log/"+channel), func([]byte) bool {
				return s.revision(t, channel) != before
			})
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
			return func() { require.NoError(t, s.server.Restart(t.Context())) }
		},
		LoseState: func(t testing.TB) {
			require.NoError(t, s.server.Kill())
			require.NoError(t, s.server.Wipe())
			require.NoError(t, s.server.Restart(t.Context()))
		},
		// One watch serves all channels of a backend. The server does not tell whose a
		// watcher is, so the clients' watch streams are read.
		Upstreams: func(t testing.TB, channel string) (n int) {
			s.mu.Lock()
			defer s.mu.Unlock()
			for b, w := range s.ways {
				// A watch that serves other channels of the backend is none of this one's.
				if this, all := b.(*etcd.Backend).Subscribed(channel); w.t == t && (this > 0 || all == 0) {
					w.mu.Lock()
					n += w.watchers
					w.mu.Unlock()
				}
			}
			return n
		},
		Connections: func(_ testing.TB, b dchannel.Backend) int { return s.way(b).proxy.Connections() },
		Calls:       s.calls,
		ProbeEvery:  probe,
		Holds: func(t testing.TB, channel string) (held []string) {
			for _, ns := range []string{"dchannel", "short"} {
				for _, key := range s.keys(t, ns+"/") {
					if parts := strings.Split(string(key.Key), "/"); len(parts) > 2 && parts[2] == channel {
						held = append(held, string(key.Key))
					}
				}
			}
			return held
		},
		Eternal: func(t testing.TB) (found []string) {
			for _, key := range s.keys(t, "") {
				if key.Lease == 0 {
					found = append(found, string(key.Key))
				}
			}
			return found
		},
	})
}

func (s *suite) backend(t testing.TB, opts ...etcd.Option) dchannel.Backend {
	p, err := faultproxy.New(s.server.Addr())
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, p.Close()) })
	w := &way{t: t, proxy: p}
	c, err := clientv3.New(clientv3.Config{
		Endpoints: []string{"http://" + p.Addr()}, Logger: zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithStreamInterceptor(w.count)},
	})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, c.Close()) })
	b := etcd.New(c, opts...)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ways[b] = w
	return b
}

func (s *suite) way(b dchannel.Backend) *way {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ways[b]
}

type keyValue struct {
	Key   []byte
	Lease int64
}

func (s *suite) keys(t testing.TB, prefix string) (found []keyValue) {
	r, err := s.direct.Get(t.Context(), prefix, clientv3.WithPrefix()) // keys alone come without their leases
	require.NoError(t, err)
	for _, kv := range r.Kvs {
		found = append(found, keyValue{kv.Key, kv.Lease})
	}
	return found
}

// revision is when the channel was appended to.
func (s *suite) revision(t testing.TB, channel string) int64 {
	r, err := s.direct.Get(t.Context(), "dchannel/head/"+channel)
	if err != nil || len(r.Kvs) == 0 {
		return 0
	}
	return r.Kvs[0].ModRevision
}

// calls is how many messages the server has had from its clients.
func (s *suite) calls(t testing.TB) (n int) {
	r, err := http.Get(s.server.URL() + "/metrics")
	require.NoError(t, err)
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	require.NoError(t, err)
	http.DefaultClient.CloseIdleConnections()
	for line := range bytes.Lines(body) {
		if name, value, ok := bytes.Cut(bytes.TrimSpace(line), []byte("} ")); ok && bytes.HasPrefix(name, []byte("grpc_server_msg_received_total")) {
			v, err := strconv.ParseFloat(string(value), 64)
			require.NoError(t, err)
			n += int(v)
		}
	}
	return n
}

// count counts the watchers that a client has made and not ended.
func (w *way) count(ctx context.Context, d *grpc.StreamDesc, cc *grpc.ClientConn, method string, next grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	stream, err := next(ctx, d, cc, method, opts...)
	if err != nil || !strings.HasSuffix(method, "/Watch") {
		return stream, err
	}
	c := &counted{ClientStream: stream, w: w}
	context.AfterFunc(stream.Context(), c.end)
	return c, nil
}

type counted struct {
	grpc.ClientStream
	w    *way
	made int
}

func (c *counted) add(n int) {
	c.w.mu.Lock()
	defer c.w.mu.Unlock()
	c.made += n
	c.w.watchers += n
}

// end forgets the stream's watchers: they are gone with it.
func (c *counted) end() {
	c.w.mu.Lock()
	defer c.w.mu.Unlock()
	c.w.watchers -= c.made
	c.made = 0
}

func (c *counted) SendMsg(m any) error {
	err := c.ClientStream.SendMsg(m)
	if r, ok := m.(*pb.WatchRequest); ok && err == nil {
		switch {
		case r.GetCreateRequest() != nil:
			c.add(1)
		case r.GetCancelRequest() != nil:
			c.add(-1)
		}
	}
	return err
}
