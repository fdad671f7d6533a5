package redis_test

import (
	"context"
	"crypto/tls"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/redis"
	"github.com/dchannel/dchannel/internal/testserver"
)

// over makes a backend on a client with these options.
func over(t *testing.T, o *goredis.Options) *redis.Backend {
	o.MaintNotificationsConfig = noMaintenance
	client := goredis.NewClient(o)
	b := redis.New(client, quiet)
	t.Cleanup(func() {
		require.NoError(t, b.Close())
		require.NoError(t, client.Close())
	})
	return b
}

// works publishes and listens on b.
func works(t *testing.T, b dchannel.Backend) *dchannel.Channel {
	ctx, done := context.WithTimeout(t.Context(), within)
	defer done()
	ch, err := dchannel.Open(ctx, "access", b)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, ch.Detach()) })
	require.NoError(t, ch.Publish(ctx, "in order"))
	v, err := ch.Listen(ctx)
	require.NoError(t, err)
	require.Equal(t, "in order", v)
	return ch
}

// refuses expects that Open and Publish fail with want, say text, and not secret.
func refuses(t *testing.T, b dchannel.Backend, want error, text, secret string) {
	for _, call := range []func(ctx context.Context) error{
		func(ctx context.Context) error {
			_, err := dchannel.Open(ctx, "access", b)
			return err
		},
		func(ctx context.Context) error {
			return dchannel.New("access", b).Publish(ctx, "m")
		},
	} {
		start := time.Now()
		ctx, done := context.WithTimeout(t.Context(), 2*time.Second)
		err := call(ctx)
		done()
		require.Less(t, time.Since(start), 2*time.Second+500*time.Millisecond)
		require.ErrorIs(t, err, want)
		require.ErrorContains(t, err, text)
		require.NotErrorIs(t, err, dchannel.ErrUncertain)
		if secret != "" {
			require.NotContains(t, err.Error(), secret)
		}
	}
}

func TestTLS(t *testing.T) {
	server := testserver.RedisForTest(t, testserver.RedisConfig{TLS: testserver.MutualTLS, Password: "open sesame"})
	works(t, over(t, &goredis.Options{Addr: server.Addr(), TLSConfig: server.TLS(), Password: "open sesame"}))
	refuses(t, over(t, &goredis.Options{Addr: server.Addr(), TLSConfig: &tls.Config{MinVersion: tls.VersionTLS12}, Password: "open sesame"}),
		dchannel.ErrUnavailable, "certificate", "open sesame")
	refuses(t, over(t, &goredis.Options{Addr: server.Addr(), TLSConfig: server.TLS(), Password: "shut sesame"}),
		dchannel.ErrRefused, "WRONGPASS", "sesame")
}

func TestServersThatCannot(t *testing.T) {
	t.Run("down", func(t *testing.T) {
		server := testserver.RedisForTest(t, testserver.RedisConfig{})
		require.NoError(t, server.Kill())
		refuses(t, over(t, &goredis.Options{Addr: server.Addr()}), dchannel.ErrUnavailable, "refused", "")
	})
	t.Run("wrong password", func(t *testing.T) {
		server := testserver.RedisForTest(t, testserver.RedisConfig{Password: "hunter2"})
		refuses(t, over(t, &goredis.Options{Addr: server.Addr(), Password: "hunter3"}), dchannel.ErrRefused, "WRONGPASS", "hunter")
	})
	t.Run("read-only", func(t *testing.T) {
		server := testserver.RedisForTest(t, testserver.RedisConfig{})
		ch := works(t, over(t, &goredis.Options{Addr: server.Addr()}))
		a := admin(t, server)
		require.NoError(t, a.ReplicaOf(t.Context(), "127.0.0.1", "1").Err())
		err := ch.Publish(t.Context(), "m")
		require.ErrorIs(t, err, dchannel.ErrRefused)
		require.ErrorContains(t, err, "READONLY")
		require.ErrorIs(t, ch.Close(), dchannel.ErrRefused)
		require.NoError(t, a.ReplicaOf(t.Context(), "NO", "ONE").Err())
		intact(t, ch)
	})
	t.Run("out of memory", func(t *testing.T) {
		server := testserver.RedisForTest(t, testserver.RedisConfig{})
		ch := works(t, over(t, &goredis.Options{Addr: server.Addr()}))
		a := admin(t, server)
		require.NoError(t, a.ConfigSet(t.Context(), "maxmemory", "1mb").Err())
		err := ch.Publish(t.Context(), "m")
		require.ErrorIs(t, err, dchannel.ErrRefused)
		require.ErrorContains(t, err, "OOM")
		require.NoError(t, a.ConfigSet(t.Context(), "maxmemory", "0").Err())
		intact(t, ch)
	})
}

// intact expects that what was published is there, and nothing else, and that the
// channel goes on.
func intact(t *testing.T, ch *dchannel.Channel) {
	require.NoError(t, ch.Publish(t.Context(), "after"))
	b := ch.Status()
	require.Zero(t, b.Lost+b.LostUnknown)
	ctx, done := context.WithTimeout(t.Context(), within)
	defer done()
	for {
		v, err := ch.Listen(ctx)
		if err != nil {
			// Becoming another server's replica and coming back is a change of the
			// server's memory as far as anybody can tell.
			require.ErrorIs(t, err, dchannel.ErrLost)
			continue
		}
		require.Equal(t, "after", v)
		return
	}
}

// Sentinel names the server; after a failover by command the channel goes on, and who
// listens is told that the new server may not have everything.
func TestSentinel(t *testing.T) {
	s := testserver.RedisSentinelForTest(t, 1, 1, testserver.RedisConfig{})
	var sentinels []string
	for _, node := range s.Sentinels {
		sentinels = append(sentinels, node.Addr())
	}
	client := goredis.NewFailoverClient(&goredis.FailoverOptions{
		MasterName: testserver.SentinelMaster, SentinelAddrs: sentinels,
	})
	b := redis.New(client, quiet, redis.WithProbe(100*time.Millisecond, time.Second))
	t.Cleanup(func() {
		require.NoError(t, b.Close())
		require.NoError(t, client.Close())
	})
	ch := works(t, b)
	sentinel := goredis.NewSentinelClient(&goredis.Options{Addr: sentinels[0], MaintNotificationsConfig: noMaintenance})
	t.Cleanup(func() { require.NoError(t, sentinel.Close()) })
	require.Eventually(t, func() bool { return sentinel.Failover(t.Context(), testserver.SentinelMaster).Err() == nil },
		within, 50*time.Millisecond)
	lost, done := context.WithTimeout(t.Context(), within)
	defer done()
	_, err := ch.Listen(lost)
	require.ErrorIs(t, err, dchannel.ErrLost)
	require.Eventually(t, func() bool { return ch.Publish(t.Context(), "after the failover") == nil }, within, 50*time.Millisecond)
	ctx, done := context.WithTimeout(t.Context(), within)
	defer done()
	for {
		v, err := ch.Listen(ctx)
		if err == nil {
			require.Equal(t, "after the failover", v)
			return
		}
		require.ErrorIs(t, err, dchannel.ErrLost)
	}
}
