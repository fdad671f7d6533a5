package redis_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/redis"
	"github.com/dchannel/dchannel/internal/faultproxy"
	"github.com/dchannel/dchannel/internal/testserver"
)

func shortly(d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), d)
}

func TestLockRepliesLost(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	l := locked{t, f.backend(), "c"}
	other := locked{t, f.backend(), "c"}
	ctx := ctxFor(t)
	require.Zero(t, l.state())
	// lost runs a step whose reply never comes, and then the same again.
	lost := func(what string, step func() (dchannel.LockState, error)) dchannel.LockState {
		t.Helper()
		cut := f.proxy.CutBeforeReply([]byte(what))
		_, err := step()
		require.ErrorIs(t, err, dchannel.ErrUncertain)
		<-cut
		before := other.state()
		s := l.ok(step())
		require.Equal(t, before.Fence, s.Fence, "the second one did nothing")
		require.Equal(t, before.Ended, s.Ended)
		require.Equal(t, before.Waiting, s.Waiting)
		return s
	}
	for range 10 {
		one, two := dchannel.NewID(), dchannel.NewID()
		s := lost("acquire", func() (dchannel.LockState, error) {
			return l.b.Acquire(ctx, "c", dchannel.Lease{Token: one, TTL: time.Minute})
		})
		require.True(t, s.Held && s.Mine)
		s = lost("acquire", func() (dchannel.LockState, error) {
			return l.b.Acquire(ctx, "c", dchannel.Lease{Token: two, TTL: time.Minute, Fair: true})
		})
		require.Equal(t, 1, s.Waiting)
		s = lost("extend", func() (dchannel.LockState, error) { return l.b.Extend(ctx, "c", one, time.Hour) })
		require.Equal(t, time.Hour, s.TTL)
		first := s.Fence
		s = lost("release", func() (dchannel.LockState, error) { return l.b.Release(ctx, "c", one) })
		require.True(t, s.Held && !s.Mine)
		require.Equal(t, dchannel.LockEnd{Fence: first, Outcome: dchannel.LockReleased}, s.Ended[0])
		s = l.lineUp(two, time.Minute)
		require.True(t, s.Held && s.Mine)
		fence := s.Fence
		s = lost("end", func() (dchannel.LockState, error) { return l.b.EndLock(ctx, "c", fence, dchannel.LockForced) })
		require.False(t, s.Held)
		require.Equal(t, dchannel.LockEnd{Fence: fence, Outcome: dchannel.LockForced}, s.Ended[0])
	}

	// Without a reply there is nothing uncertain about having read.
	cut := f.proxy.CutBeforeReply([]byte("state"))
	_, err := l.b.LockState(ctx, "c")
	require.ErrorIs(t, err, dchannel.ErrUnavailable)
	require.NotErrorIs(t, err, dchannel.ErrUncertain)
	<-cut
}

func lockCalls(b *redis.Backend) map[string]func(ctx context.Context) error {
	token := dchannel.NewID()
	last := func(_ dchannel.LockState, err error) error { return err }
	return map[string]func(ctx context.Context) error{
		"Acquire": func(ctx context.Context) error {
			return last(b.Acquire(ctx, "c", dchannel.Lease{Token: token, TTL: time.Minute}))
		},
		"Extend":    func(ctx context.Context) error { return last(b.Extend(ctx, "c", token, time.Minute)) },
		"Release":   func(ctx context.Context) error { return last(b.Release(ctx, "c", token)) },
		"EndLock":   func(ctx context.Context) error { return last(b.EndLock(ctx, "c", 1, dchannel.LockForced)) },
		"LockState": func(ctx context.Context) error { return last(b.LockState(ctx, "c")) },
		"WatchLock": func(ctx context.Context) error {
			sub, err := b.WatchLock(ctx, "c", func() {})
			if err == nil {
				sub.Close()
			}
			return err
		},
	}
}

func TestLockCallsFollowTheRules(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	reads := []string{"LockState", "WatchLock"}

	b := f.backend()
	for name, call := range lockCalls(b) {
		// Whether a write is sent into the silence or waits for a connection is the
		// pool's choice: only the first is uncertain.
		write := !slices.Contains(reads, name)
		eventually(t, name+" was sent", func() bool {
			eventually(t, "there is a connection", func() bool { _, err := b.LockState(ctxFor(t), "c"); return err == nil })
			f.proxy.Blackhole(faultproxy.Both)
			ctx, cancel := shortly(50 * time.Millisecond)
			defer cancel()
			began := time.Now()
			err := call(ctx)
			require.Less(t, time.Since(began), 150*time.Millisecond, name)
			require.ErrorIs(t, err, context.DeadlineExceeded, name)
			canceled, cancel := context.WithCancel(context.Background())
			cancel()
			again := call(canceled)
			require.ErrorIs(t, again, context.Canceled, name)
			require.NotErrorIs(t, again, dchannel.ErrUncertain, name)
			require.NoError(t, f.proxy.Heal())
			if !write {
				require.NotErrorIs(t, err, dchannel.ErrUncertain, name)
			}
			return !write || errors.Is(err, dchannel.ErrUncertain)
		})
	}

	require.NoError(t, f.proxy.Refuse(true))
	for name, call := range lockCalls(f.backend()) {
		err := call(ctxFor(t))
		require.ErrorIs(t, err, dchannel.ErrUnavailable, name)
		require.NotErrorIs(t, err, dchannel.ErrUncertain, name)
	}
	require.NoError(t, f.proxy.Refuse(false))

	closed := f.backend()
	require.NoError(t, closed.Close())
	for name, call := range lockCalls(closed) {
		require.ErrorIs(t, call(ctxFor(t)), dchannel.ErrBackendClosed, name)
	}
	for name, call := range lockCalls(redis.New(nil)) {
		require.ErrorIs(t, call(ctxFor(t)), dchannel.ErrInvalidOption, name)
	}
	require.NoError(t, f.admin.Set(ctxFor(t), "{dchannel/0}:l:c", "not a hash", time.Minute).Err())
	for name, call := range lockCalls(f.backend()) {
		if name != "WatchLock" {
			require.ErrorIs(t, call(ctxFor(t)), dchannel.ErrRefused, name)
		}
	}
}

// Fences grow, whatever the server forgets.
func TestFencesGrow(t *testing.T) {
	for name, cfg := range map[string]testserver.RedisConfig{
		"without persistence": {},
		"persistent":          {Persistence: testserver.AOFAlways},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, cfg)
			l := locked{t, f.backend(), "c"}
			var last uint64
			grows := func(what string) {
				t.Helper()
				for range 5 {
					token := dchannel.NewID()
					var s dchannel.LockState
					eventually(t, what, func() bool {
						var err error
						s, err = l.b.Acquire(ctxFor(t), "c", dchannel.Lease{Token: token, TTL: time.Minute})
						return err == nil
					})
					require.True(t, s.Held && s.Mine, what)
					require.Greater(t, s.Fence, last, what)
					last = s.Fence
					l.release(token)
				}
			}
			grows("at first")
			require.NoError(t, f.admin.FlushAll(ctxFor(t)).Err())
			grows("flushed")
			require.NoError(t, l.b.Remove(ctxFor(t), "c"))
			grows("removed")
			token := dchannel.NewID()
			fence := l.try(token).Fence
			require.NoError(t, f.server.Kill())
			require.NoError(t, f.server.Restart(ctxFor(t)))
			var s dchannel.LockState
			eventually(t, "back", func() bool {
				var err error
				s, err = l.b.LockState(ctxFor(t), "c")
				return err == nil
			})
			if name == "persistent" {
				require.True(t, s.Held)
				require.Equal(t, fence, s.Fence)
				l.release(token)
			} else {
				require.Zero(t, s)
			}
			last = fence
			grows("restarted")
			require.NoError(t, f.server.Kill())
			require.NoError(t, f.server.Wipe())
			require.NoError(t, f.server.Restart(ctxFor(t)))
			grows("wiped")

			// A record from a server whose clock was ahead: it goes on from there.
			ahead := uint64(time.Now().Add(time.Hour).UnixMicro())
			require.NoError(t, f.admin.HSet(ctxFor(t), "{dchannel/0}:l:c", "fence", ahead).Err())
			last = ahead
			grows("by one")
			require.Equal(t, ahead+5, last)
		})
	}
}

// A clock that goes back makes a deadline that lies too far ahead. Nobody holds for
// longer than the TTL from when that is seen.
func TestClockGoesBack(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	l := locked{t, f.backend(), "c"}
	l.acquire(dchannel.Lease{Token: dchannel.NewID(), TTL: 100 * time.Millisecond})
	require.NoError(t, f.admin.HSet(ctxFor(t), "{dchannel/0}:l:c", "until", time.Now().Add(time.Hour).UnixMicro()).Err())
	require.Positive(t, l.state().Remaining)
	began := time.Now()
	l.expire()
	require.Less(t, time.Since(began), time.Second)
}

func TestLockWithoutMemory(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	l := locked{t, f.backend(), "c"}
	ctx := ctxFor(t)
	one, two, three := dchannel.NewID(), dchannel.NewID(), dchannel.NewID()
	l.try(one)
	l.lineUp(two, time.Minute)
	publish(t, l.b, "d", "x")
	require.NoError(t, f.admin.ConfigSet(ctx, "maxmemory", "1mb").Err())
	refused := func(channel string, fair bool) {
		t.Helper()
		_, err := l.b.Acquire(ctx, channel, dchannel.Lease{Token: three, TTL: time.Minute, Fair: fair})
		require.ErrorIs(t, err, dchannel.ErrRefused)
	}
	refused("new", false)
	refused("c", true)
	require.True(t, l.extend(one, time.Hour).Mine)
	require.True(t, l.release(one).Held, "handed over")
	require.Zero(t, l.release(three).Waiting)
	require.False(t, l.end(l.state().Fence, dchannel.LockForced).Held)
	require.NoError(t, f.admin.ConfigSet(ctx, "maxmemory", "0").Err())
	eternal(t, f.server)
}

func TestWatchLock(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	l := locked{t, f.backend(redis.WithProbe(50*time.Millisecond, time.Second)), "c"}
	writer := locked{t, f.backend(), "c"}
	var hints atomic.Int64
	sub, err := l.b.WatchLock(ctxFor(t), "c", func() { hints.Add(1) })
	require.NoError(t, err)
	defer sub.Close()
	elsewhere, err := l.b.WatchLock(ctxFor(t), "d", func() { t.Error("nothing happens there") })
	require.NoError(t, err)
	sink, _ := subscribe(t, l.b, "c")
	_, err = l.b.WatchLock(ctxFor(t), "c", func() {})
	require.Error(t, err, "twice")
	channels, connections := f.subscriptions()
	require.Equal(t, 4, channels, "two watches, a subscription, and one for probes")
	require.Equal(t, 1, connections)

	hinted := func(what string, step func()) {
		t.Helper()
		before := hints.Load()
		step()
		eventually(t, what, func() bool { return hints.Load() > before })
	}
	one, two := dchannel.NewID(), dchannel.NewID()
	writer.try(one)
	writer.lineUp(two, time.Minute)
	hinted("handed over", func() { writer.release(one) })
	hinted("released", func() { writer.release(two) })
	hinted("by force", func() { writer.end(writer.try(dchannel.NewID()).Fence, dchannel.LockForced) })
	hinted("closed", func() { writer.end(writer.try(dchannel.NewID()).Fence, dchannel.LockClosed) })
	hinted("seen to be expired", func() {
		writer.acquire(dchannel.Lease{Token: dchannel.NewID(), TTL: time.Millisecond})
		writer.expire()
	})
	// What concerns nobody wakes nobody: the pushes of one connection come in order.
	before := hints.Load()
	token := dchannel.NewID()
	writer.try(token)
	writer.extend(token, time.Minute)
	writer.try(dchannel.NewID())
	writer.release(dchannel.NewID())
	publish(t, writer.b, "c", "sentinel")
	eventually(t, "pushed", sink.has("sentinel"))
	require.Equal(t, before, hints.Load())

	elsewhere.Close()
	for range 5 {
		hinted("a cut", func() { f.proxy.Cut() })
	}
	hinted("a release after cuts", func() {
		eventually(t, "released", func() bool { _, err := writer.b.Release(ctxFor(t), "c", token); return err == nil })
	})
	hinted("a flush", func() { require.NoError(t, f.admin.FlushAll(ctxFor(t)).Err()) })
	hinted("junk", func() { require.NoError(t, f.admin.Publish(ctxFor(t), "{dchannel/0}:n:c", "junk").Err()) })
	hinted("a silent connection", func() {
		before := sink.count("interrupted")
		f.proxy.Blackhole(faultproxy.Both)
		eventually(t, "interrupted", func() bool { return sink.count("interrupted") > before })
		require.NoError(t, f.proxy.Heal())
	})

	sub.Close()
	eventually(t, "unsubscribed", func() bool { n, _ := f.subscriptions(); return n == 2 })
	again, err := l.b.WatchLock(ctxFor(t), "c", func() { hints.Add(1) })
	require.NoError(t, err)
	defer again.Close()
	hinted("the backend is closed", func() { require.NoError(t, l.b.Close()) })
}

// TestMain runs this instead of the tests in the process that is to be killed.
const holderEnv = "DCHANNEL_TEST_LOCK_HOLDER"

// hold acquires the lock, tells so, and extends it for as long as it lives.
func hold(addr string) {
	b := redis.New(goredis.NewClient(&goredis.Options{Addr: addr, MaintNotificationsConfig: noMaintenance}), quiet)
	token := dchannel.NewID()
	s, err := b.Acquire(context.Background(), "c", dchannel.Lease{Token: token, TTL: time.Second, Info: "the child"})
	for err == nil && s.Held && s.Mine {
		fmt.Println("held")
		<-time.After(100 * time.Millisecond)
		s, err = b.Extend(context.Background(), "c", token, time.Second)
	}
	fmt.Println("lost", err)
}

// Redis' own expiry is late when there are many keys with a time to live; a lock's is
// a comparison of numbers.
func TestHolderIsKilledAmongManyVolatileKeys(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	ctx := ctxFor(t)
	for i := 0; i < 20_000; {
		p := f.admin.Pipeline()
		for range 2000 {
			// They end from now until long after the test: the server's cycle has much to do.
			p.Set(ctx, fmt.Sprint("volatile ", i), "x", time.Duration(1000+i%20_000)*time.Millisecond)
			i++
		}
		_, err := p.Exec(ctx)
		require.NoError(t, err)
	}
	l := locked{t, f.backend(), "c"}
	for round := range 3 {
		child := exec.Command(os.Args[0], "-test.run=^$")
		child.Env = append(os.Environ(), holderEnv+"="+f.server.Addr())
		out, err := child.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, child.Start())
		lines := bufio.NewScanner(out)
		for range 3 {
			require.True(t, lines.Scan())
			require.Equal(t, "held", lines.Text())
		}
		require.NoError(t, child.Process.Kill())
		_ = child.Wait() // killed
		s := l.state()
		require.Equal(t, "the child", s.Info)
		require.True(t, s.Held)
		fence := s.Fence

		// A waiter as the core is one: a timer from Remaining, then a read.
		waited := make(chan time.Time, 1)
		go func(s dchannel.LockState) {
			for s.Held {
				<-time.After(s.Remaining)
				var err error
				if s, err = l.b.LockState(ctx, "c"); err != nil {
					t.Error(err)
				}
			}
			waited <- time.Now()
		}(s)
		until, err := f.admin.HGet(ctx, "{dchannel/0}:l:c", "until").Int64()
		require.NoError(t, err)
		over := time.UnixMicro(until) // the server's clock is this machine's
		late := func(who string, seen time.Time) {
			t.Logf("%s sees the end %v after it", who, seen.Sub(over))
			require.Less(t, seen.Sub(over), 300*time.Millisecond)
			require.GreaterOrEqual(t, seen.Sub(over), time.Duration(0))
		}
		if round%2 == 0 { // in the others, nobody looks but the waiter
			l.expire()
			late("a reader", time.Now())
		}
		late("a waiter", <-waited)
		require.Equal(t, []dchannel.LockEnd{{Fence: fence, Outcome: dchannel.LockExpired}}, l.state().Ended[:1])
		require.True(t, l.try(dchannel.NewID()).Mine)
		l.end(0, dchannel.LockForced)
	}
}

// A server that stands still beyond the TTL lets the lock expire by its clock.
func TestServerIsPausedBeyondTheTTL(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	l := locked{t, f.backend(), "c"}
	token := dchannel.NewID()
	l.acquire(dchannel.Lease{Token: token, TTL: 50 * time.Millisecond})
	require.NoError(t, f.server.Pause())
	over := time.After(60 * time.Millisecond)
	<-over
	require.NoError(t, f.server.Resume())
	require.Equal(t, "free mine expired", describe(l.extend(token, time.Minute)))
}

func BenchmarkLock(b *testing.B) {
	f := newFixture(b, testserver.RedisConfig{})
	l := locked{b, f.backend(), "c"}
	direct := redis.New(f.admin, quiet)
	b.Cleanup(func() { direct.Close() })
	l.b = direct
	usec := func(b *testing.B, n int) {
		var calls, us int
		_, err := fmt.Sscanf(f.info("commandstats", "cmdstat_evalsha"), "calls=%d,usec=%d", &calls, &us)
		require.NoError(b, err)
		b.ReportMetric(float64(us)/float64(calls), "server-us/step")
		b.ReportMetric(float64(calls)/float64(n), "steps/op")
	}
	run := func(name string, waiting int, step func(b *testing.B)) {
		b.Run(name, func(b *testing.B) {
			require.NoError(b, f.admin.FlushAll(context.Background()).Err())
			l.try(dchannel.NewID())
			for range waiting {
				l.lineUp(dchannel.NewID(), time.Hour)
			}
			if waiting == 0 {
				l.end(0, dchannel.LockForced)
			}
			require.NoError(b, f.admin.ConfigResetStat(context.Background()).Err())
			b.ReportAllocs()
			n := 0
			for b.Loop() {
				step(b)
				n++
			}
			usec(b, n)
		})
	}
	ctx := context.Background()
	must := func(b *testing.B, err error) {
		if err != nil {
			b.Fatal(err)
		}
	}
	cycle := func(b *testing.B) {
		token := dchannel.NewID()
		_, err := direct.Acquire(ctx, "c", dchannel.Lease{Token: token, TTL: time.Minute})
		must(b, err)
		_, err = direct.Release(ctx, "c", token)
		must(b, err)
	}
	run("AcquireRelease", 0, cycle)
	run("State", 0, func(b *testing.B) { _, err := direct.LockState(ctx, "c"); must(b, err) })
	run("State/1000-waiting", 1000, func(b *testing.B) { _, err := direct.LockState(ctx, "c"); must(b, err) })
	run("HandOver/1000-waiting", 1000, func(b *testing.B) {
		_, err := direct.Acquire(ctx, "c", dchannel.Lease{Token: dchannel.NewID(), TTL: time.Hour, Fair: true})
		must(b, err)
		_, err = direct.EndLock(ctx, "c", 0, dchannel.LockForced)
		must(b, err)
	})
}
