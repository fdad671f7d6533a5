package etcd_test

import (
	"context"
	"io"
	"net/http"
	"regexp"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/etcd"
	"github.com/dchannel/dchannel/internal/drivertest"
	"github.com/dchannel/dchannel/internal/faultproxy"
	"github.com/dchannel/dchannel/internal/testserver"
)

func rig(server *testserver.Server, opts ...etcd.Option) drivertest.Rig {
	return drivertest.Rig{Server: server, Connect: func(t *testing.T, addr string) dchannel.Backend {
		client, err := clientv3.New(clientv3.Config{Endpoints: []string{"http://" + addr}})
		require.NoError(t, err)
		b := etcd.New(client, opts...)
		t.Cleanup(func() {
			assert.NoError(t, b.Close())
			assert.NoError(t, client.Close())
		})
		return b
	}}
}

func TestProofCut(t *testing.T) {
	drivertest.Cut(t, rig(server(t)), 200, 200)
}

func TestProofKill(t *testing.T) {
	drivertest.Kill(t, rig(testserver.EtcdForTest(t, testserver.EtcdConfig{})), 200, 200, 3)
}

func TestProofWipe(t *testing.T) {
	s := server(t)
	drivertest.LoseAll(t, rig(s), 100, 200, func() {
		assert.NoError(t, s.Kill())
		assert.NoError(t, s.Wipe())
		assert.NoError(t, s.Restart(t.Context()))
	})
}

// The log is compacted to its head while the connections are cut.
func TestProofCompaction(t *testing.T) {
	s := server(t)
	proxy, err := faultproxy.New(s.Addr())
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, proxy.Close()) })
	direct := connect(t, s.URL())
	y := drivertest.Load(t, rig(s), proxy.Addr(), 50, 200, 10*time.Millisecond, func(ctx context.Context) {
		for range 5 {
			assert.NoError(t, proxy.Refuse(true))
			proxy.Cut()
			head, err := direct.Get(t.Context(), "x")
			if assert.NoError(t, err) {
				_, err = direct.Compact(t.Context(), head.Header.Revision)
				if err != nil {
					assert.ErrorContains(t, err, "compacted") // nothing came in between
				}
			}
			assert.NoError(t, proxy.Heal())
			select {
			case <-time.After(200 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	})
	t.Logf("compacted to the head during cuts: %v", y)
	require.Equal(t, y.Missing, int(y.Reported))
	require.Equal(t, drivertest.Tally{Perfect: 50}, y)
}

func TestProofTenThousandChannels(t *testing.T) {
	s := server(t)
	proxy, err := faultproxy.New(s.Addr()) // it counts
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, proxy.Close()) })
	r := rig(s)
	r.Connect = func(t *testing.T, _ string) dchannel.Backend { return rig(s).Connect(t, proxy.Addr()) }
	drivertest.Many(t, r, 10_000, 3, 1536, proxy.Connections)
}

func TestProofHundredHandles(t *testing.T) {
	s := server(t)
	drivertest.OneUpstream(t, rig(s), 100, func(string) int {
		return metric(t, s, `etcd_debugging_mvcc_watcher_total`)
	})
}

// metric is a figure of the server.
func metric(t *testing.T, s *testserver.Server, name string) int {
	response, err := http.Get(s.URL() + "/metrics") //nolint:noctx // a test's
	require.NoError(t, err)
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	require.NoError(t, err)
	http.DefaultClient.CloseIdleConnections()
	found := regexp.MustCompile(`(?m)^` + name + ` (\d+)$`).FindSubmatch(body)
	require.NotNil(t, found, "no metric %s", name)
	n, err := strconv.Atoi(string(found[1]))
	require.NoError(t, err)
	return n
}
