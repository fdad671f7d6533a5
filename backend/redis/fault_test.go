package redis_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/redis"
	"github.com/dchannel/dchannel/internal/faultproxy"
	"github.com/dchannel/dchannel/internal/testserver"
)

func TestRetryIsIdempotent(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	b := f.backend()
	ctx := ctxFor(t)
	retry := func(channel string, fr dchannel.Frame, age time.Duration) (dchannel.Position, error) {
		fr.Age = age
		return b.Publish(ctx, channel, fr)
	}

	t.Run("found as the last one, below others, and below the marker", func(t *testing.T) {
		fr := frame("x")
		pos, err := b.Publish(ctx, "c", fr)
		require.NoError(t, err)
		got, err := retry("c", fr, time.Millisecond)
		require.NoError(t, err)
		require.Equal(t, pos, got)
		for i := range 200 {
			publish(t, b, "c", fmt.Sprint(i))
		}
		got, err = retry("c", fr, time.Second)
		require.NoError(t, err)
		require.Equal(t, pos, got)
		_, err = b.MarkClosed(ctx, "c", dchannel.NewID(), time.Minute)
		require.NoError(t, err)
		got, err = retry("c", fr, time.Second)
		require.NoError(t, err)
		require.Equal(t, pos, got)
		_, err = retry("c", frame("another"), time.Second)
		require.ErrorIs(t, err, dchannel.ErrChanClosed)
		require.EqualValues(t, 202, head(t, b, "c").Seq)
	})

	t.Run("appended when there was none", func(t *testing.T) {
		got, err := retry("none", frame("x"), time.Hour)
		require.NoError(t, err)
		require.EqualValues(t, 1, got.Seq)
		got, err = retry("none", frame("y"), time.Hour)
		require.NoError(t, err)
		require.EqualValues(t, 2, got.Seq, "all of the log is there")
	})

	t.Run("uncertain when retention has dropped entries that young", func(t *testing.T) {
		small := f.backend(redis.WithNamespace("small"), redis.WithRetention(1, time.Minute))
		for range 300 {
			publish(t, small, "c", "x")
		}
		fr := frame("y")
		fr.Age = time.Minute
		_, err := small.Publish(ctx, "c", fr)
		require.ErrorIs(t, err, dchannel.ErrUncertain)
		require.EqualValues(t, 300, head(t, small, "c").Seq)
		require.NoError(t, f.admin.Del(ctx, "{small/0}:s:c").Err())
		_, err = small.Publish(ctx, "c", fr)
		require.ErrorIs(t, err, dchannel.ErrUncertain)
	})
}

// go-redis runs an EVALSHA again when its reply is lost, and says nil. Between the
// two, others may have appended.
func TestLostReply(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	b, other := f.backend(), f.backend()
	ctx := ctxFor(t)
	publish(t, b, "c", "first")
	publish(t, other, "c", "second")
	for i := range 10 {
		fr := frame(fmt.Sprint("lost ", i))
		cut := f.proxy.CutBeforeReply(fr.Data)
		_, err := b.Publish(ctx, "c", fr)
		require.ErrorIs(t, err, dchannel.ErrUncertain)
		require.NotErrorIs(t, err, dchannel.ErrUnavailable)
		<-cut
		want := head(t, other, "c").Position
		for range i * 10 {
			publish(t, other, "c", "between")
		}
		fr.Age = time.Millisecond
		got, err := b.Publish(ctx, "c", fr)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	n := 0
	for _, e := range read(t, other, "c", dchannel.Position{}).Entries {
		if strings.HasPrefix(string(e.Data), "lost") {
			n++
		}
	}
	require.Equal(t, 10, n)

	id := dchannel.NewID()
	cut := f.proxy.CutBeforeReply([]byte(id.String()))
	_, err := b.MarkClosed(ctx, "c", id, time.Minute)
	require.ErrorIs(t, err, dchannel.ErrUncertain)
	<-cut
	pos, err := b.MarkClosed(ctx, "c", id, time.Minute)
	require.NoError(t, err)
	require.Equal(t, head(t, other, "c").Position, pos)
}

// A first attempt may be executed long after its sender has given it up, and has
// retried with success: by a server that was stopped meanwhile.
func TestLateAttemptIsNotASecondAppend(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	b, other := f.backend(), f.backend()
	publish(t, b, "c", "x")
	publish(t, other, "c", "y")
	fr := frame("late")
	// Bytes get through, but a second and a half later than the retry's.
	f.proxy.Delay(1500 * time.Millisecond)
	short, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	_, err := b.Publish(short, "c", fr)
	require.ErrorIs(t, err, dchannel.ErrUncertain)
	require.ErrorIs(t, err, context.DeadlineExceeded)

	direct := redis.New(f.admin, quiet)
	t.Cleanup(func() { direct.Close() })
	fr.Age = 200 * time.Millisecond
	pos, err := direct.Publish(ctxFor(t), "c", fr)
	require.NoError(t, err)
	require.EqualValues(t, 3, pos.Seq)
	publish(t, direct, "c", "z")
	before := f.info("commandstats", "cmdstat_evalsha")
	eventually(t, "the first attempt arrives", func() bool { return f.info("commandstats", "cmdstat_evalsha") != before })
	require.Equal(t, []string{"x", "y", "late", "z"}, texts(read(t, direct, "c", dchannel.Position{}).Entries))
}

func TestNothingSentIsUnavailable(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	b := f.backend()
	ctx := ctxFor(t)
	require.NoError(t, f.proxy.Refuse(true))
	for range 2 { // with an unknown clock, and with a known one
		_, err := b.Publish(ctx, "c", frame("x"))
		require.ErrorIs(t, err, dchannel.ErrUnavailable)
		require.NotErrorIs(t, err, dchannel.ErrUncertain)
		_, err = b.MarkClosed(ctx, "c", dchannel.NewID(), time.Minute)
		require.ErrorIs(t, err, dchannel.ErrUnavailable)
		_, err = b.Heads(ctx, nil)
		require.ErrorIs(t, err, dchannel.ErrUnavailable)
		_, err = b.Read(ctx, "c", dchannel.Position{}, 1)
		require.ErrorIs(t, err, dchannel.ErrUnavailable)
		_, err = b.Subscribe(ctx, "c", newRecorder(t))
		require.ErrorIs(t, err, dchannel.ErrUnavailable)
		require.ErrorIs(t, b.Remove(ctx, "c"), dchannel.ErrUnavailable)
		require.NoError(t, f.proxy.Refuse(false))
		eventually(t, "the pool dials again", func() bool { _, err := b.Heads(ctx, nil); return err == nil })
		publish(t, b, "d", "x")
		require.NoError(t, f.proxy.Refuse(true))
		f.proxy.Cut()
	}
}

func TestCallsReturnWithTheirContext(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	b := f.backend()
	publish(t, b, "c", "x")
	subscribe(t, b, "c")
	for name, c := range map[string]struct {
		write bool
		call  func(ctx context.Context) error
	}{
		"Publish": {true, func(ctx context.Context) error { _, err := b.Publish(ctx, "c", frame("x")); return err }},
		"MarkClosed": {true, func(ctx context.Context) error {
			_, err := b.MarkClosed(ctx, "c", dchannel.NewID(), time.Hour)
			return err
		}},
		"Remove":    {true, func(ctx context.Context) error { return b.Remove(ctx, "c") }},
		"Read":      {false, func(ctx context.Context) error { _, err := b.Read(ctx, "c", dchannel.Position{}, 1); return err }},
		"Heads":     {false, func(ctx context.Context) error { _, err := b.Heads(ctx, []string{"c"}); return err }},
		"Ping":      {false, func(ctx context.Context) error { _, err := b.Heads(ctx, nil); return err }},
		"Subscribe": {false, func(ctx context.Context) error { _, err := b.Subscribe(ctx, "d", newRecorder(t)); return err }},
	} {
		t.Run(name, func(t *testing.T) {
			eventually(t, "there is a connection", func() bool { _, err := b.Heads(ctxFor(t), nil); return err == nil })
			f.proxy.Blackhole(faultproxy.Both)
			defer f.proxy.Heal()
			ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
			defer cancel()
			began := time.Now()
			err := c.call(ctx)
			require.Less(t, time.Since(began), 150*time.Millisecond)
			require.ErrorIs(t, err, context.DeadlineExceeded)
			require.Equal(t, c.write, errors.Is(err, dchannel.ErrUncertain), "%v", err)

			canceled, cancel := context.WithCancel(context.Background())
			cancel()
			err = c.call(canceled)
			require.ErrorIs(t, err, context.Canceled)
			require.NotErrorIs(t, err, dchannel.ErrUncertain)
		})
	}
}

func TestServerSaysNo(t *testing.T) {
	t.Run("password", func(t *testing.T) {
		f := newFixture(t, testserver.RedisConfig{Password: "secret"})
		b := f.backend()
		_, err := b.Publish(ctxFor(t), "c", frame("x"))
		require.ErrorIs(t, err, dchannel.ErrRefused)
		_, err = b.Subscribe(ctxFor(t), "c", newRecorder(t))
		require.ErrorIs(t, err, dchannel.ErrRefused)
		require.NotContains(t, err.Error(), "secret")
	})

	t.Run("memory", func(t *testing.T) {
		f := newFixture(t, testserver.RedisConfig{MaxMemory: "2mb"})
		b := f.backend()
		var err error
		for range 100 {
			if _, err = b.Publish(ctxFor(t), "c", dchannel.Frame{ID: dchannel.NewID(), Count: 1, Data: make([]byte, 100_000)}); err != nil {
				break
			}
		}
		require.ErrorIs(t, err, dchannel.ErrRefused)
		last := head(t, b, "c")
		page := read(t, b, "c", dchannel.Position{Epoch: last.Epoch, Seq: last.Seq - 1})
		require.Len(t, page.Entries, 1, "nothing half done")
	})

	t.Run("the documented permissions are enough, and others are refused", func(t *testing.T) {
		f := newFixture(t, testserver.RedisConfig{Users: []string{"app on >secret " + rights,
			"few on >secret resetchannels &{dchannel/0}:p:* &{dchannel/0}:c:yes* ~* +@all"}})
		client := func(user string) *redis.Backend {
			c := goredis.NewClient(&goredis.Options{Addr: f.server.Addr(), Username: user, Password: "secret", MaintNotificationsConfig: noMaintenance})
			t.Cleanup(func() { c.Close() })
			b := redis.New(c, quiet)
			t.Cleanup(func() { b.Close() })
			return b
		}
		b := client("app")
		sink, sub := subscribe(t, b, "c")
		p := publish(t, b, "c", "x")
		eventually(t, "pushed", sink.has("x"))
		fr := frame("y")
		fr.Age = time.Minute
		_, err := b.Publish(ctxFor(t), "c", fr)
		require.NoError(t, err)
		_, err = b.MarkClosed(ctxFor(t), "c", dchannel.NewID(), time.Minute)
		require.NoError(t, err)
		require.Len(t, read(t, b, "c", p).Entries, 2)
		_, err = b.Heads(ctxFor(t), nil)
		require.NoError(t, err)
		sub.Close()
		require.NoError(t, b.Remove(ctxFor(t), "c"))
		everyLockStep(t, b, "locked")

		elsewhere := redis.New(f.client(f.server.Addr()), quiet, redis.WithNamespace("other"))
		t.Cleanup(func() { elsewhere.Close() })
		publish(t, elsewhere, "c", "x")

		// One channel that is refused harms no other one, in the same batch too.
		b = client("few")
		sink, _ = subscribe(t, b, "yes")
		var wg sync.WaitGroup
		for i := range 50 {
			wg.Go(func() {
				name := fmt.Sprint("yes ", i)
				if i%10 == 0 {
					name = fmt.Sprint("no ", i)
				}
				_, err := b.Subscribe(ctxFor(t), name, newRecorder(t))
				if no := i%10 == 0; no != errors.Is(err, dchannel.ErrRefused) || no != (err != nil) {
					t.Errorf("%s: %v", name, err)
				}
			})
		}
		wg.Wait()
		publish(t, b, "yes", "z")
		eventually(t, "pushed", sink.has("z"))
		require.Zero(t, sink.count("interrupted"))
	})
}

// rights are those of the package's documentation.
const rights = "~{dchannel/0}:* resetchannels &{dchannel/0}:* +@connection" +
	" +evalsha +eval +subscribe +unsubscribe +publish +info +time" +
	" +get +set +mget +unlink +del +pttl +pexpire +xadd +xrange +xrevrange" +
	" +hget +hmget +hset +hdel +zadd +zrem +zcard +zscore +zrange +zrangebyscore"

func TestOptions(t *testing.T) {
	client := goredis.NewClient(&goredis.Options{Addr: "127.0.0.1:1", Dialer: func(context.Context, string, string) (net.Conn, error) {
		return nil, errors.New("nothing may be dialled")
	}})
	t.Cleanup(func() { client.Close() })
	cluster := goredis.NewClusterClient(&goredis.ClusterOptions{})
	t.Cleanup(func() { cluster.Close() })
	var none *goredis.Client
	for want, b := range map[string]*redis.Backend{
		"the client is nil":                        redis.New(nil),
		"nil *redis.Client":                        redis.New(none),
		"*redis.ClusterClient":                     redis.New(cluster),
		`"a{b"`:                                    redis.New(client, redis.WithNamespace("a{b")),
		"messages is 0, at least 1":                redis.New(client, redis.WithRetention(0, time.Second)),
		"duration is 1ns, at least 1ms":            redis.New(client, redis.WithRetention(1, 1)),
		"WithIdleExpiry: the duration is -1s":      redis.New(client, redis.WithIdleExpiry(-time.Second)),
		"interval is 0s, at least 10ms":            redis.New(client, redis.WithProbe(0, time.Second)),
		"timeout is 1ms, at least 10ms":            redis.New(client, redis.WithProbe(time.Second, time.Millisecond)),
		"the logger is nil":                        redis.New(client, redis.WithLogger(nil)),
		"WithNamespace: \"\" is not 1 to 64 bytes": redis.New(client, redis.WithNamespace(""), redis.WithLogger(nil)),
	} {
		_, err := b.Publish(context.Background(), "c", frame("x"))
		require.ErrorIs(t, err, dchannel.ErrInvalidOption)
		require.ErrorContains(t, err, want)
		_, err = b.Subscribe(context.Background(), "c", newRecorder(t))
		require.ErrorIs(t, err, dchannel.ErrInvalidOption)
		_, err = b.Heads(context.Background(), nil)
		require.ErrorIs(t, err, dchannel.ErrInvalidOption)
		_, err = b.Read(context.Background(), "c", dchannel.Position{}, 1)
		require.ErrorIs(t, err, dchannel.ErrInvalidOption)
		require.ErrorIs(t, b.Remove(context.Background(), "c"), dchannel.ErrInvalidOption)
		require.NoError(t, b.Close())
	}
}
