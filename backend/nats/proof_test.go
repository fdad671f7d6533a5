package nats_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"sync"
	"testing"
	"time"

	natsgo "github.com/nats-io/nats.go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/nats"
	"github.com/dchannel/dchannel/internal/drivertest"
	"github.com/dchannel/dchannel/internal/testserver"
)

func rig(server *testserver.Server, opts ...nats.Option) drivertest.Rig {
	return drivertest.Rig{Server: server, Connect: func(t *testing.T, addr string) dchannel.Backend {
		conn, err := natsgo.Connect("nats://"+addr, natsgo.MaxReconnects(-1), natsgo.ReconnectWait(10*time.Millisecond),
			natsgo.ErrorHandler(func(*natsgo.Conn, *natsgo.Subscription, error) {})) // it is cut on purpose
		require.NoError(t, err)
		b := nats.New(conn, opts...)
		t.Cleanup(func() {
			assert.NoError(t, b.Close())
			conn.Close()
		})
		return b
	}}
}

func TestProofCut(t *testing.T) {
	drivertest.Cut(t, rig(testserver.NATSForTest(t, testserver.NATSConfig{})), 200, 200)
}

func TestProofKill(t *testing.T) {
	drivertest.Kill(t, rig(testserver.NATSForTest(t, testserver.NATSConfig{})), 200, 200, 3)
}

func TestProofTenThousandChannels(t *testing.T) {
	server := testserver.NATSForTest(t, testserver.NATSConfig{})
	drivertest.Many(t, rig(server), 10_000, 3, 2048, func() int {
		return monitor(t, server, "connz").NumConnections
	})
}

func TestProofHundredHandles(t *testing.T) {
	server := testserver.NATSForTest(t, testserver.NATSConfig{})
	drivertest.OneUpstream(t, rig(server), 100, func(channel string) int {
		n := 0
		for _, c := range monitor(t, server, "connz?subs=1").Connections {
			for _, s := range c.Subscriptions {
				if s == "dchannel.push."+channel {
					n++
				}
			}
		}
		return n
	})
}

type monitored struct {
	NumConnections int `json:"num_connections"`
	Connections    []struct {
		Subscriptions []string `json:"subscriptions_list"`
	}
}

func monitor(t *testing.T, server *testserver.Server, page string) (m monitored) {
	response, err := http.Get(server.NATSMonitor() + "/" + page) //nolint:noctx // a test's
	require.NoError(t, err)
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	require.NoError(t, err)
	http.DefaultClient.CloseIdleConnections()
	require.NoError(t, json.Unmarshal(body, &m))
	return m
}

// Eight processes publish on one channel, at the same time and in each other's way:
// every listener sees the same order, and nothing is lost.
func TestProofEightPublishersOneOrder(t *testing.T) {
	const publishers, messages = 8, 500
	r := rig(testserver.NATSForTest(t, testserver.NATSConfig{}))
	var listeners []*dchannel.Channel
	for range 3 {
		ch, err := dchannel.Open(t.Context(), "one", r.Connect(t, r.Server.Addr()))
		require.NoError(t, err)
		listeners = append(listeners, ch)
	}
	orders := make([][]string, len(listeners))
	var listening, publishing sync.WaitGroup
	for i, ch := range listeners {
		listening.Go(func() {
			defer func() { assert.NoError(t, ch.Detach()) }()
			for m, err := range ch.Messages(t.Context()) {
				var s string
				if !assert.NoError(t, err) || !assert.NoError(t, m.Decode(&s)) {
					return
				}
				orders[i] = append(orders[i], s)
			}
		})
	}
	start := time.Now()
	for p := range publishers {
		ch := dchannel.New("one", r.Connect(t, r.Server.Addr()), dchannel.WithTimeout(time.Minute))
		publishing.Go(func() {
			for n := range messages {
				assert.NoError(t, ch.PublishAsync(t.Context(), fmt.Sprintf("%d-%04d", p, n)))
			}
			assert.NoError(t, ch.Detach())
		})
	}
	publishing.Wait()
	took := time.Since(start)
	require.NoError(t, dchannel.New("one", r.Connect(t, r.Server.Addr())).Close())
	listening.Wait()
	require.Len(t, orders[0], publishers*messages)
	last := map[byte]string{}
	for _, s := range orders[0] {
		require.Less(t, last[s[0]], s)
		last[s[0]] = s
	}
	for _, o := range orders[1:] {
		require.Equal(t, orders[0], o)
	}
	t.Logf("%d processes × %d messages: one order for %d listeners, %d lost, %.0f messages per second",
		publishers, messages, len(listeners), publishers*messages-len(orders[0]), publishers*messages/took.Seconds())
}
