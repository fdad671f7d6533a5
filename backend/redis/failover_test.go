package redis_test

import (
	"context"
	"net"
	"sync/atomic"
	"testing"
	"time"

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

// A promoted replica holds what it was told of to the same deadline. What it was not
// told of is lost, and somebody else gets a lock, under a greater fence.
func TestLockOnAPromotedReplica(t *testing.T) {
	old, next := newFixture(t, testserver.RedisConfig{}), newFixture(t, testserver.RedisConfig{})
	ctx := ctxFor(t)
	host, port, err := net.SplitHostPort(old.server.Addr())
	require.NoError(t, err)
	require.NoError(t, next.admin.Do(ctx, "REPLICAOF", host, port).Err())
	eventually(t, "replica in sync", func() bool { return next.info("replication", "master_link_status") == "up" })

	was, is := locked{t, old.backend(), "c"}, locked{t, next.backend(), "c"}
	one, two, three := dchannel.NewID(), dchannel.NewID(), dchannel.NewID()
	before := was.try(one)
	was.lineUp(two, time.Minute)
	require.EqualValues(t, 1, old.admin.Do(ctx, "WAIT", 1, 5000).Val())
	_, err = is.b.Acquire(ctx, "d", dchannel.Lease{Token: three, TTL: time.Minute})
	require.ErrorIs(t, err, dchannel.ErrRefused, "a replica")
	require.NoError(t, next.admin.Do(ctx, "REPLICAOF", "NO", "ONE").Err())
	lost := was.release(one)
	require.Greater(t, lost.Fence, before.Fence)

	s := is.extend(one, time.Minute)
	require.True(t, s.Held && s.Mine)
	require.Equal(t, before.Fence, s.Fence)
	require.Equal(t, 1, s.Waiting)
	s = is.release(one)
	require.Greater(t, s.Fence, lost.Fence, "by the clock, which the two have in common")
	require.True(t, is.lineUp(two, time.Minute).Mine)
}
