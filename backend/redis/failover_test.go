package redis_test

import (
	"context"
	"net"
	"sync/atomic"
	"testing"

	goredis "github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/redis"
	"github.com/dchannel/dchannel/internal/testserver"
)

// A replica that is promoted goes on with the log as far as it had it, under the same
// epoch and the same numbers: only the incarnation tells.
func TestPromotedReplica(t *testing.T) {
	old, next := newFixture(t, testserver.RedisConfig{}), newFixture(t, testserver.RedisConfig{})
	ctx := ctxFor(t)
	host, port, err := net.SplitHostPort(old.server.Addr())
	require.NoError(t, err)
	require.NoError(t, next.admin.Do(ctx, "REPLICAOF", host, port).Err())
	eventually(t, "replica in sync", func() bool { return next.info("replication", "master_link_status") == "up" })

	var addr atomic.Value
	addr.Store(old.proxy.Addr())
	client := goredis.NewClient(&goredis.Options{
		Addr: "the master", MaintNotificationsConfig: noMaintenance,
		Dialer: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, addr.Load().(string))
		},
	})
	t.Cleanup(func() { client.Close() })
	b := redis.New(client, quiet)
	t.Cleanup(func() { b.Close() })
	sink, _ := subscribe(t, b, "c")
	kept := publish(t, b, "c", "kept")
	before := head(t, b, "c")
	require.EqualValues(t, 1, old.admin.Do(ctx, "WAIT", 1, 5000).Val())
	require.NoError(t, next.admin.Do(ctx, "REPLICAOF", "NO", "ONE").Err())
	lost := publish(t, b, "c", "lost")

	addr.Store(next.proxy.Addr())
	require.NoError(t, old.server.Kill())
	eventually(t, "resynced", func() bool { return sink.count("resync") == 1 })
	var after []dchannel.Head
	eventually(t, "heads", func() bool { after, err = b.Heads(ctx, []string{"c"}); return err == nil })
	require.Equal(t, kept, after[0].Position)
	require.NotEqual(t, before.Incarnation, after[0].Incarnation)
	again := publish(t, b, "c", "again")
	require.Equal(t, lost, again, "the same number, another entry")
	eventually(t, "pushed", sink.has("again"))
}
