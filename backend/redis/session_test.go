package redis_test

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/redis"
	"github.com/dchannel/dchannel/internal/faultproxy"
	"github.com/dchannel/dchannel/internal/testserver"
)

// subscriptions returns how many channels have a subscriber, and how many
// connections subscribe to anything.
func (f *fixture) subscriptions() (channels, connections int) {
	names, err := f.admin.PubSubChannels(context.Background(), "*").Result()
	require.NoError(f.t, err)
	list, err := f.admin.Do(context.Background(), "CLIENT", "LIST", "TYPE", "pubsub").Text()
	require.NoError(f.t, err)
	for _, c := range list {
		if c == '\n' {
			connections++
		}
	}
	return len(names), connections
}

func TestOneConnectionAndNothingLeft(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	b := redis.New(f.client(f.server.Addr()), quiet) // the proxy has goroutines for each connection
	t.Cleanup(func() { b.Close() })
	before := runtime.NumGoroutine()
	var subs []dchannel.Subscription
	var sinks []*recorder
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() {
			r := newRecorder(t)
			sub, err := b.Subscribe(ctxFor(t), fmt.Sprint(i), r)
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			subs, sinks = append(subs, sub), append(sinks, r)
			mu.Unlock()
		})
	}
	wg.Wait()
	channels, connections := f.subscriptions()
	require.Equal(t, 101, channels, "and one for probes")
	require.Equal(t, 1, connections)

	_, err := b.Subscribe(ctxFor(t), "0", newRecorder(t))
	require.Error(t, err, "twice")

	for _, s := range subs[50:] {
		s.Close()
		s.Close()
	}
	eventually(t, "unsubscribed", func() bool { n, _ := f.subscriptions(); return n == 51 })
	for i := range 100 {
		publish(t, b, fmt.Sprint(i), "x")
	}
	for i, r := range sinks[:50] {
		eventually(t, "pushed", r.has("x"))
		require.Empty(t, sinks[50+i].texts())
		require.Empty(t, r.events)
	}
	for _, s := range subs {
		s.Close()
	}
	eventually(t, "nothing is left", func() bool {
		channels, connections := f.subscriptions()
		return channels == 0 && connections == 0
	})
	eventually(t, "no goroutine is left", func() bool { return runtime.NumGoroutine() <= before })

	sink, _ := subscribe(t, b, "again")
	publish(t, b, "again", "y")
	eventually(t, "pushed", sink.has("y"))
}

// A channel that is closed and opened again at once must be subscribed when the call
// returns, although the confirmation of the former subscription comes in between.
func TestSubscribeAgainAtOnce(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	b := f.backend()
	subscribe(t, b, "other")
	for i := range 300 {
		ctx, cancel := context.WithCancel(context.Background())
		if i%2 == 0 {
			go cancel()
		}
		if sub, err := b.Subscribe(ctx, "c", newRecorder(t)); err == nil {
			sub.Close()
		}
		cancel()
		sink, sub := subscribe(t, b, "c")
		publish(t, b, "c", fmt.Sprint("n", i))
		eventually(t, "pushed", sink.has(fmt.Sprint("n", i)))
		require.Zero(t, sink.count("interrupted"))
		sub.Close()
	}
}

func TestCloseSubscriptionWhilePushing(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	b := f.backend()
	subscribe(t, b, "other")
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
				publish(t, b, "c", "x")
			}
		}
	})
	for range 200 {
		r, sub := subscribe(t, b, "c")
		eventually(t, "pushed", r.has("x"))
		sub.Close()
		n := len(r.texts())
		require.Len(t, r.texts(), n)
		r.in <- struct{}{} // from now on any call of the sink is an error
	}
	close(done)
	wg.Wait()
}

func TestCut(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	b := f.backend()
	var sinks []*recorder
	for i := range 20 {
		r, _ := subscribe(t, b, fmt.Sprint(i))
		sinks = append(sinks, r)
	}
	memory := head(t, b, "0").Incarnation
	for n := range 20 {
		f.proxy.Cut()
		for i, r := range sinks {
			eventually(t, "resynced", func() bool { return r.count("resync") > n })
			require.GreaterOrEqual(t, r.count("interrupted"), r.count("live"))
			text := fmt.Sprint("after ", n, ".", i)
			var err error
			eventually(t, "published", func() bool {
				_, err = b.Publish(ctxFor(t), fmt.Sprint(i), frame(text))
				return err == nil
			})
			eventually(t, "pushed", r.has(text))
		}
	}
	require.Equal(t, memory, head(t, b, "0").Incarnation)
	_, connections := f.subscriptions()
	require.Equal(t, 1, connections)
}

func TestRestart(t *testing.T) {
	for _, c := range []struct {
		name  string
		cfg   testserver.RedisConfig
		opts  []redis.Option
		same  bool // incarnation
		keeps bool // log
		kill  bool
	}{
		{name: "without persistence", kill: true},
		{name: "persistent, not declared", cfg: testserver.RedisConfig{Persistence: testserver.AOFAlways}, keeps: true},
		{name: "persistent, declared", cfg: testserver.RedisConfig{Persistence: testserver.AOFAlways}, opts: []redis.Option{redis.WithDurable()}, keeps: true, same: true, kill: true},
		{name: "declared, and it is not true", opts: []redis.Option{redis.WithDurable()}, kill: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, c.cfg)
			b := f.backend(c.opts...)
			sink, _ := subscribe(t, b, "c")
			pos := publish(t, b, "c", "x")
			before := head(t, b, "c")
			if c.kill {
				require.NoError(t, f.server.Kill())
			} else {
				require.NoError(t, f.server.Stop())
			}
			eventually(t, "interrupted", func() bool { return sink.count("interrupted") == 1 })
			_, err := b.Subscribe(ctxFor(t), "new", newRecorder(t))
			require.ErrorIs(t, err, dchannel.ErrUnavailable)
			require.NoError(t, f.server.Restart(ctxFor(t)))
			eventually(t, "resynced", func() bool { return sink.count("resync") == 1 })
			var after dchannel.Head
			eventually(t, "heads", func() bool {
				heads, err := b.Heads(ctxFor(t), []string{"c"})
				if err == nil {
					after = heads[0]
				}
				return err == nil
			})
			require.Equal(t, c.same, before.Incarnation == after.Incarnation)
			require.Equal(t, c.keeps, after.Position == pos)
			next := publish(t, b, "c", "y")
			require.Equal(t, c.keeps, next.Epoch == pos.Epoch)
			require.GreaterOrEqual(t, next.Epoch, pos.Epoch)
			eventually(t, "pushed", sink.has("y"))
		})
	}
}

func TestFlush(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	b := f.backend(redis.WithProbe(20*time.Millisecond, time.Second))
	sink, _ := subscribe(t, b, "c")
	pos := publish(t, b, "c", "x")
	before := head(t, b, "c").Incarnation
	require.NoError(t, f.admin.FlushAll(ctxFor(t)).Err())
	// The quiet connection is still there; the probe finds the flush.
	eventually(t, "resynced", func() bool { return sink.count("resync") == 1 })
	after := head(t, b, "c")
	require.NotEqual(t, before, after.Incarnation)
	require.Zero(t, after.Position)
	require.Greater(t, publish(t, b, "c", "y").Epoch, pos.Epoch)
	require.Equal(t, after.Incarnation, read(t, f.backend(), "c", pos).Head.Incarnation)
	require.Zero(t, sink.count("interrupted"))
}

// The stricter declaration wins, and the two do not replace each other's.
func TestDurableAndNotTogether(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{Persistence: testserver.AOFAlways})
	strict, durable := f.backend(), f.backend(redis.WithDurable())
	id := head(t, durable, "c").Incarnation
	for range 3 {
		require.Equal(t, id, head(t, strict, "c").Incarnation)
		require.Equal(t, id, head(t, durable, "c").Incarnation)
	}
}

func TestProbe(t *testing.T) {
	for _, d := range []faultproxy.Direction{faultproxy.ToServer, faultproxy.ToClient} {
		f := newFixture(t, testserver.RedisConfig{})
		b := f.backend(redis.WithProbe(50*time.Millisecond, 100*time.Millisecond))
		sink, _ := subscribe(t, b, "c")
		f.proxy.Blackhole(d)
		eventually(t, "noticed", func() bool { return sink.count("interrupted") == 1 })
		require.NoError(t, f.proxy.Heal())
		eventually(t, "resynced", func() bool { return sink.count("resync") > 0 })
		var err error
		eventually(t, "published", func() bool { _, err = b.Publish(ctxFor(t), "c", frame("x")); return err == nil })
		eventually(t, "pushed", sink.has("x"))
	}
}

// A probe costs two commands, and a quiet backend sends nothing else.
func TestProbeCost(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	b := f.backend(redis.WithProbe(100*time.Millisecond, time.Second))
	sink, _ := subscribe(t, b, "c")
	for range 50 {
		subscribe(t, b, fmt.Sprint(t.Name(), len(sink.texts()), time.Now().UnixNano()))
	}
	require.NoError(t, f.admin.ConfigResetStat(ctxFor(t)).Err())
	<-time.After(time.Second) // what is counted is what happens in this time
	var calls, probes int
	_, err := fmt.Sscanf(f.info("commandstats", "cmdstat_evalsha"), "calls=%d", &probes)
	require.NoError(t, err)
	require.InDelta(t, 10, probes, 4)
	_, err = fmt.Sscanf(f.info("commandstats", "cmdstat_subscribe"), "calls=%d", &calls)
	require.Error(t, err, "no subscribe")
	require.Zero(t, sink.count("resync"))
}

func TestPause(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	b := f.backend(redis.WithProbe(50*time.Millisecond, 200*time.Millisecond))
	sink, _ := subscribe(t, b, "c")
	require.NoError(t, f.server.Pause())
	eventually(t, "noticed", func() bool { return sink.count("interrupted") == 1 })
	require.NoError(t, f.server.Resume())
	eventually(t, "resynced", func() bool { return sink.count("resync") > 0 })
	var err error
	eventually(t, "published", func() bool { _, err = b.Publish(ctxFor(t), "c", frame("x")); return err == nil })
	eventually(t, "pushed", sink.has("x"))
}

func TestForeignPushIsSkipped(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	b := f.backend()
	sink, _ := subscribe(t, b, "c")
	for _, junk := range []string{"", "x", "D1 0 0 0 x y z m\n", string(make([]byte, 1000))} {
		require.NoError(t, f.admin.Publish(ctxFor(t), "{dchannel/0}:c:c", junk).Err())
	}
	publish(t, b, "c", "ours")
	eventually(t, "pushed", sink.has("ours"))
	require.Len(t, sink.texts(), 1)
	require.Empty(t, sink.events)
}

func TestBackendClose(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	client := f.client(f.proxy.Addr())
	b := redis.New(client, quiet)
	sink, sub := subscribe(t, b, "c")
	publish(t, b, "c", "x")
	before := runtime.NumGoroutine()
	require.NoError(t, b.Close())
	require.NoError(t, b.Close())
	require.Less(t, runtime.NumGoroutine(), before)
	require.Equal(t, 1, sink.count("failed"))
	require.ErrorIs(t, sink.reasons[0], dchannel.ErrBackendClosed)
	sub.Close()
	ctx := ctxFor(t)
	_, err := b.Publish(ctx, "c", frame("x"))
	require.ErrorIs(t, err, dchannel.ErrBackendClosed)
	_, err = b.MarkClosed(ctx, "c", dchannel.NewID(), time.Minute)
	require.ErrorIs(t, err, dchannel.ErrBackendClosed)
	_, err = b.Read(ctx, "c", dchannel.Position{}, 1)
	require.ErrorIs(t, err, dchannel.ErrBackendClosed)
	_, err = b.Heads(ctx, nil)
	require.ErrorIs(t, err, dchannel.ErrBackendClosed)
	_, err = b.Subscribe(ctx, "c", newRecorder(t))
	require.ErrorIs(t, err, dchannel.ErrBackendClosed)
	require.ErrorIs(t, b.Remove(ctx, "c"), dchannel.ErrBackendClosed)
	eventually(t, "nothing is left", func() bool { n, c := f.subscriptions(); return n == 0 && c == 0 })
	require.NoError(t, client.Ping(ctx).Err(), "the client is not ours to close")
}

func TestBackendCloseWhileTheServerIsSilent(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	b := f.backend()
	sink, _ := subscribe(t, b, "c")
	f.proxy.Blackhole(faultproxy.Both)
	result := make(chan error, 1)
	go func() {
		_, err := b.Publish(context.Background(), "c", frame("x"))
		result <- err
	}()
	eventually(t, "under way", func() bool { return f.proxy.Connections() >= 2 })
	began := time.Now()
	require.NoError(t, b.Close())
	require.Less(t, time.Since(began), 1500*time.Millisecond)
	require.ErrorIs(t, <-result, dchannel.ErrBackendClosed)
	require.Equal(t, 1, sink.count("failed"))
	require.NoError(t, f.proxy.Heal())
}

func TestClientClosedUnderneath(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	client := f.client(f.proxy.Addr())
	b := redis.New(client, quiet)
	t.Cleanup(func() { b.Close() })
	sink, _ := subscribe(t, b, "c")
	require.NoError(t, client.Close())
	eventually(t, "failed for good", func() bool { return sink.count("failed") == 1 })
	_, err := b.Publish(ctxFor(t), "c", frame("x"))
	require.ErrorIs(t, err, dchannel.ErrUnavailable)
}

func TestManySubscriptions(t *testing.T) {
	const n = 10_000
	f := newFixture(t, testserver.RedisConfig{})
	b := f.backend()
	subscribe(t, b, "warm")
	names := make([]string, n)
	for i := range names {
		names[i] = fmt.Sprintf("channel-%d", i)
	}
	sink := &counter{}
	subs := make([]dchannel.Subscription, n)
	const callers = 500 // the runtime keeps about 500 bytes of each goroutine that there ever was
	each := func(f func(int)) {
		var wg sync.WaitGroup
		for c := range callers {
			wg.Go(func() {
				for i := c; i < n; i += callers {
					f(i)
				}
			})
		}
		wg.Wait()
	}
	each(func(int) { runtime.Gosched() })
	goroutines, heap := runtime.NumGoroutine(), heapInUse()
	began := time.Now()
	each(func(i int) {
		var err error
		if subs[i], err = b.Subscribe(context.Background(), names[i], sink); err != nil {
			t.Error(err)
		}
	})
	took := time.Since(began)
	per := (int(heapInUse()) - int(heap)) / n
	t.Logf("%d subscriptions in %v, %d bytes each", n, took, per)
	require.LessOrEqual(t, per, 400)
	require.Equal(t, goroutines, runtime.NumGoroutine())
	_, connections := f.subscriptions()
	require.Equal(t, 1, connections)

	began = time.Now()
	f.proxy.Cut()
	eventually(t, "all resynced", func() bool { return sink.resyncs() == n })
	t.Logf("resynced after a cut in %v", time.Since(began))

	began = time.Now()
	heads, err := b.Heads(ctxFor(t), names)
	require.NoError(t, err)
	require.Len(t, heads, n)
	t.Logf("%d heads in %v", n, time.Since(began))

	began = time.Now()
	for _, s := range subs {
		s.Close()
	}
	eventually(t, "unsubscribed", func() bool { c, _ := f.subscriptions(); return c == 2 })
	t.Logf("unsubscribed in %v", time.Since(began))
}

func heapInUse() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

type counter struct {
	mu sync.Mutex
	n  int
}

func (c *counter) Entry(dchannel.Entry)        {}
func (c *counter) State(dchannel.State, error) {}

func (c *counter) Resync(error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n++
}

func (c *counter) resyncs() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n
}
