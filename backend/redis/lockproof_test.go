package redis_test

import (
	"fmt"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/redis"
	"github.com/dchannel/dchannel/internal/drivertest"
	"github.com/dchannel/dchannel/internal/lockproof"
	"github.com/dchannel/dchannel/internal/locktest"
	"github.com/dchannel/dchannel/internal/testserver"
)

// openInChild connects in the processes that the proofs of the locks start.
func openInChild(addr string) (dchannel.Backend, error) {
	return redis.New(goredis.NewClient(&goredis.Options{Addr: addr, MaintNotificationsConfig: noMaintenance}), quiet), nil
}

func TestLockProofStoppedHolders(t *testing.T) {
	server := testserver.RedisForTest(t, testserver.RedisConfig{})
	lockproof.StoppedHolders(t, rig(server), 200*time.Millisecond, 12)
}

// Redis' own expiry is seconds late when there are many keys with a time to live.
func TestLockProofKilledHolders(t *testing.T) {
	server := testserver.RedisForTest(t, testserver.RedisConfig{})
	client, ctx := admin(t, server), ctxFor(t)
	const volatile = 20_000
	for i := 0; i < volatile; {
		p := client.Pipeline()
		for range 2000 {
			// They end from now until long after the test: the server's cycle has much to do.
			p.Set(ctx, fmt.Sprint("volatile ", i), "x", time.Duration(5000+i)*time.Millisecond)
			i++
		}
		_, err := p.Exec(ctx)
		require.NoError(t, err)
	}
	lockproof.KilledHolders(t, rig(server), 500*time.Millisecond, time.Millisecond, 8, true, 300*time.Millisecond)
	n, err := client.DBSize(ctx).Result()
	require.NoError(t, err)
	t.Logf("beside %d other keys, nearly all with a time to live", n)
}

func TestLockProofWakeUps(t *testing.T) {
	server := testserver.RedisForTest(t, testserver.RedisConfig{})
	r := rig(server)
	lockproof.WakeUps(t, func() dchannel.Backend { return r.Connect(t, server.Addr()) }, 500, 50*time.Millisecond)
}

func TestLockProofTwoHundredContenders(t *testing.T) {
	server := testserver.RedisForTest(t, testserver.RedisConfig{})
	lockproof.TwoHundredContenders(t, rig(server), map[string]float64{"wait": 10, "fair": 1.1})
}

func TestLockProofLinearizable(t *testing.T) {
	server := testserver.RedisForTest(t, testserver.RedisConfig{})
	r := rig(server)
	report := locktest.Check(t, func() dchannel.Backend { return r.Connect(t, server.Addr()) }, locktest.Config{For: 3 * time.Second, Late: 10 * time.Millisecond})
	require.Positive(t, report.Expiries)
}

func TestMutex(t *testing.T) {
	drivertest.Mutex(t, rig(testserver.RedisForTest(t, testserver.RedisConfig{})))
}
