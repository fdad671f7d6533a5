package redis_test

import (
	"slices"
	"strings"
	"testing"

	goredis "github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/redis"
	"github.com/dchannel/dchannel/internal/drivertest"
	"github.com/dchannel/dchannel/internal/testserver"
)

func rig(server *testserver.Server, opts ...redis.Option) drivertest.Rig {
	return drivertest.Rig{Server: server, Connect: func(t *testing.T, addr string) dchannel.Backend {
		client := goredis.NewClient(&goredis.Options{
			Addr: addr, MaintNotificationsConfig: noMaintenance,
			MaxIdleConns: 1, PipelinePoolSize: -1, // what pools keep at rest is their owner's choice
		})
		b := redis.New(client, append([]redis.Option{quiet}, opts...)...)
		t.Cleanup(func() {
			assert.NoError(t, b.Close())
			assert.NoError(t, client.Close())
		})
		return b
	}}
}

func admin(t *testing.T, server *testserver.Server) *goredis.Client {
	c := goredis.NewClient(&goredis.Options{Addr: server.Addr(), ClientName: "admin", MaintNotificationsConfig: noMaintenance})
	t.Cleanup(func() { assert.NoError(t, c.Close()) })
	return c
}

func TestProofCut(t *testing.T) {
	server := testserver.RedisForTest(t, testserver.RedisConfig{})
	drivertest.Cut(t, rig(server), 200, 500)
	eternal(t, server)
}

func TestProofKill(t *testing.T) {
	server := testserver.RedisForTest(t, testserver.RedisConfig{Persistence: testserver.AOFAlways})
	drivertest.Kill(t, rig(server, redis.WithDurable()), 200, 200, 3)
}

func TestProofRestartWithoutPersistence(t *testing.T) {
	server := testserver.RedisForTest(t, testserver.RedisConfig{})
	drivertest.LoseAll(t, rig(server), 100, 200, func() {
		assert.NoError(t, server.Kill())
		assert.NoError(t, server.Restart(t.Context()))
	})
}

func TestProofTenThousandChannels(t *testing.T) {
	server := testserver.RedisForTest(t, testserver.RedisConfig{})
	a := admin(t, server)
	drivertest.Many(t, rig(server), 10_000, 2, 1536, func() int {
		list, err := a.ClientList(t.Context()).Result()
		require.NoError(t, err)
		return strings.Count(list, "\n") - 1 // without our own
	})
}

func TestProofHundredHandles(t *testing.T) {
	server := testserver.RedisForTest(t, testserver.RedisConfig{})
	a := admin(t, server)
	drivertest.OneUpstream(t, rig(server), 100, func(string) int {
		names, err := a.PubSubChannels(t.Context(), "*").Result()
		require.NoError(t, err)
		// The driver's own probe channel is none of ours.
		names = slices.DeleteFunc(names, func(n string) bool { return !strings.Contains(n, "one") })
		total := 0
		if len(names) > 0 {
			subs, err := a.PubSubNumSub(t.Context(), names...).Result()
			require.NoError(t, err)
			for _, n := range subs {
				total += int(n)
			}
		}
		return total
	})
	eternal(t, server)
}

// eternal expects that every key of the server has a time to live.
func eternal(t *testing.T, server *testserver.Server) {
	a := admin(t, server)
	keys, err := a.Keys(t.Context(), "*").Result()
	require.NoError(t, err)
	require.NotEmpty(t, keys)
	without := 0
	for _, k := range keys {
		ttl, err := a.PTTL(t.Context(), k).Result()
		require.NoError(t, err)
		if ttl == -1 {
			without++
			t.Logf("no time to live: %q", k)
		}
	}
	t.Logf("%d keys, %d without a time to live", len(keys), without)
	require.Zero(t, without)
}
