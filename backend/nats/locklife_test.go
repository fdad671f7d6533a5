package nats_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/nats"
	"github.com/dchannel/dchannel/internal/testserver"
)

// The reply to each write is lost; the write is repeated.
func TestLockRepliesAreLost(t *testing.T) {
	url := sharedServer(t)
	p := proxy(t, url)
	b := behind(t, p)
	a, z := dchannel.NewID(), dchannel.NewID()
	var fence uint64
	for _, c := range []struct {
		what, needle string // what the write contains
		call         func() (dchannel.LockState, error)
		want         func(dchannel.LockState) bool
	}{
		{
			"acquire", `"token":"` + a.String(),
			func() (dchannel.LockState, error) {
				return b.Acquire(within(t), "a", dchannel.Lease{Token: a, TTL: hour})
			},
			func(s dchannel.LockState) bool { fence = s.Fence; return s.Held && s.Mine && len(s.Ended) == 0 },
		},
		{
			"extend", `"ttl_ms":7200000`,
			func() (dchannel.LockState, error) { return b.Extend(within(t), "a", a, 2*hour) },
			func(s dchannel.LockState) bool { return s.Held && s.Mine && s.TTL == 2*hour },
		},
		{
			"release", `"released"`,
			func() (dchannel.LockState, error) { return b.Release(within(t), "a", a) },
			func(s dchannel.LockState) bool { return !s.Held && s.Mine && len(s.Ended) == 1 && s.Fence == fence },
		},
		{
			"acquire again", `"token":"` + z.String(),
			func() (dchannel.LockState, error) {
				return b.Acquire(within(t), "a", dchannel.Lease{Token: z, TTL: hour})
			},
			func(s dchannel.LockState) bool { fence = s.Fence; return s.Held && s.Mine && len(s.Ended) == 1 },
		},
		{
			"force", `"forced"`,
			func() (dchannel.LockState, error) { return b.EndLock(within(t), "a", fence, dchannel.LockForced) },
			func(s dchannel.LockState) bool {
				return !s.Held && ends(s, dchannel.LockForced, dchannel.LockReleased) && len(s.Ended) == 2
			},
		},
	} {
		sprung := p.CutBeforeReplyFunc([]byte(c.needle), func(reply []byte) bool { return bytes.Contains(reply, []byte(`"seq"`)) })
		_, err := c.call()
		require.ErrorIs(t, err, dchannel.ErrUncertain, c.what)
		<-sprung
		for range 2 {
			s := insistLock(t, c.call)
			require.True(t, c.want(s), "%s: %+v", c.what, s)
		}
	}
}

func TestWatchLock(t *testing.T) {
	url := sharedServer(t)
	p := proxy(t, url)
	b, other := behind(t, p), backend(t, url)
	hints := make(chan struct{}, 1)
	w, err := b.WatchLock(within(t), "a", hinted(hints))
	require.NoError(t, err)
	await := func(what string) {
		t.Helper()
		select {
		case <-hints:
		case <-time.After(patience):
			require.FailNow(t, "no hint: "+what)
		}
	}
	sentinels := 0
	quiet := func() { // everything before a push on the same watch has come
		sentinels++
		name := fmt.Sprint("sentinel ", sentinels)
		k := subscribe(t, b, name)
		publish(t, other, name, "x")
		k.awaitEntries(t, 1)
		select {
		case <-hints:
		default:
		}
	}
	token := dchannel.NewID()
	first := acquire(t, other, "a", token, hour)
	await("acquire")
	quiet()
	_, err = other.Release(within(t), "a", token)
	require.NoError(t, err)
	await("release")
	quiet()
	acquire(t, other, "a", dchannel.NewID(), hour)
	await("acquire")
	quiet()
	_, err = other.EndLock(within(t), "a", 0, dchannel.LockForced)
	require.NoError(t, err)
	await("force")
	quiet()
	// What happened during a cut.
	quiet()
	require.NoError(t, p.Refuse(true))
	p.Cut()
	token = dchannel.NewID()
	require.Greater(t, acquire(t, other, "a", token, hour).Fence, first.Fence)
	require.NoError(t, p.Heal())
	await("after a cut")
	require.True(t, lockState(t, b, "a").Held)
	// Other locks, a publish to the channel, and what comes after the end of the watch are no hints.
	quiet()
	acquire(t, other, "b", dchannel.NewID(), hour)
	publish(t, other, "a", "x")
	w.Close()
	_, err = other.Release(within(t), "a", token)
	require.NoError(t, err)
	k := subscribe(t, b, "sentinel")
	publish(t, other, "sentinel", "x")
	k.awaitEntries(t, 1)
	require.Empty(t, hints)
	// The end of all is told.
	_, err = b.WatchLock(within(t), "a", hinted(hints))
	require.NoError(t, err)
	require.NoError(t, b.Close())
	await("close")
	_, err = b.WatchLock(within(t), "a", hinted(hints))
	require.ErrorIs(t, err, dchannel.ErrBackendClosed)
}

func TestLockCallsEndWithTheirContext(t *testing.T) {
	s := testserver.NATSForTest(t, testserver.NATSConfig{})
	b := backend(t, s.URL())
	token := dchannel.NewID()
	acquire(t, b, "a", token, hour)
	require.NoError(t, s.Pause())
	defer s.Resume() //nolint:errcheck // the server ends with the test
	for name, call := range lockCalls(b, token) {
		ctx, cancel := context.WithTimeout(within(t), 50*time.Millisecond)
		start := time.Now()
		err := call(ctx)
		cancel()
		require.ErrorIs(t, err, context.DeadlineExceeded, name)
		require.Less(t, time.Since(start), 150*time.Millisecond, name)
	}
	require.NoError(t, b.Close())
	for name, call := range lockCalls(b, token) {
		require.ErrorIs(t, call(within(t)), dchannel.ErrBackendClosed, name)
	}
}

func lockCalls(b *nats.Backend, token dchannel.ID) map[string]func(context.Context) error {
	return map[string]func(context.Context) error{
		"acquire": func(ctx context.Context) error {
			_, err := b.Acquire(ctx, "a", dchannel.Lease{Token: token, TTL: hour})
			return err
		},
		"extend":  func(ctx context.Context) error { _, err := b.Extend(ctx, "a", token, hour); return err },
		"release": func(ctx context.Context) error { _, err := b.Release(ctx, "a", token); return err },
		"end": func(ctx context.Context) error {
			_, err := b.EndLock(ctx, "a", 0, dchannel.LockForced)
			return err
		},
		"state": func(ctx context.Context) error { _, err := b.LockState(ctx, "a"); return err },
		"watch": func(ctx context.Context) error { _, err := b.WatchLock(ctx, "a", func() {}); return err },
	}
}

// What a cut leaves uncertain, the release by the same token undoes.
func TestLockUnderCuts(t *testing.T) {
	url := sharedServer(t)
	p := proxy(t, url)
	b := behind(t, p)
	ctx, stop := context.WithCancel(within(t))
	cuts := make(chan struct{})
	go func() {
		defer close(cuts)
		for ctx.Err() == nil {
			select {
			case <-time.After(rand.N(40 * time.Millisecond)):
				p.Cut()
			case <-ctx.Done():
			}
		}
	}()
	failed := 0
	insist := func(call func() (dchannel.LockState, error)) dchannel.LockState {
		for {
			s, err := call()
			if err == nil {
				return s
			}
			failed++
			require.True(t, errors.Is(err, dchannel.ErrUncertain) || errors.Is(err, dchannel.ErrUnavailable), "%v", err)
		}
	}
	var last uint64
	for range 100 {
		token := dchannel.NewID()
		s := insist(func() (dchannel.LockState, error) {
			return b.Acquire(within(t), "a", dchannel.Lease{Token: token, TTL: hour})
		})
		require.True(t, s.Held && s.Mine && s.Fence > last, "%+v", s)
		last = s.Fence
		s = insist(func() (dchannel.LockState, error) { return b.Release(within(t), "a", token) })
		require.True(t, !s.Held && s.Mine && ends(s, dchannel.LockReleased), "%+v", s)
	}
	stop()
	<-cuts
	t.Logf("%d calls failed over %d cuts", failed, p.Cuts())
}

func insistLock(t testing.TB, call func() (dchannel.LockState, error)) dchannel.LockState {
	for deadline := time.Now().Add(patience); ; {
		s, err := call()
		if err == nil {
			return s
		}
		require.True(t, errors.Is(err, dchannel.ErrUnavailable) && time.Now().Before(deadline), "%v", err)
	}
}

// A step that the server takes after the hold was over came too late, whatever its sender had read.
func TestLateStepsAreVoid(t *testing.T) {
	url := sharedServer(t)
	p := proxy(t, url)
	slow, b := behind(t, p), backend(t, url)
	for what, step := range map[string]func(dchannel.ID) (dchannel.LockState, error){
		"extend":  func(id dchannel.ID) (dchannel.LockState, error) { return slow.Extend(within(t), "extend", id, hour) },
		"release": func(id dchannel.ID) (dchannel.LockState, error) { return slow.Release(within(t), "release", id) },
	} {
		lockState(t, slow, what)
		p.Delay(250 * time.Millisecond) // what is read at 250 ms is written at 750 ms
		token := dchannel.NewID()
		acquire(t, b, what, token, 600*time.Millisecond)
		s, err := step(token)
		require.NoError(t, err)
		require.True(t, !s.Held && s.Mine && ends(s, dchannel.LockExpired), "%s: %+v", what, s)
		require.Equal(t, s.Ended, lockState(t, b, what).Ended)
		next := acquire(t, b, what, dchannel.NewID(), hour)
		require.True(t, next.Mine && next.Held && ends(next, dchannel.LockExpired) && len(next.Ended) == 1)
		p.Delay(0)
	}
}

// What no push tells: the stream is gone, the channel was removed.
func TestWatchLockFindsWhatIsNotPushed(t *testing.T) {
	server := testserver.NATSForTest(t, testserver.NATSConfig{})
	b := backend(t, server.URL(), nats.WithProbe(100*time.Millisecond, time.Second))
	for what, lose := range map[string]func(){
		"remove": func() { require.NoError(t, backend(t, server.URL()).Remove(within(t), "remove")) },
		"wipe": func() {
			require.NoError(t, server.Kill())
			require.NoError(t, server.Wipe())
			require.NoError(t, server.Restart(within(t)))
		},
	} {
		var mu sync.Mutex
		changed := make(chan struct{}, 1)
		hints := 0
		w, err := b.WatchLock(within(t), what, func() { mu.Lock(); hints++; mu.Unlock(); hinted(changed)() })
		require.NoError(t, err)
		require.True(t, acquire(t, b, what, dchannel.NewID(), hour).Mine)
		<-changed
		lose()
		for deadline := time.After(patience); ; {
			select {
			case <-changed:
			case <-deadline:
				require.FailNow(t, "no hint: "+what)
			}
			if s, err := b.LockState(within(t), what); err == nil && !s.Held {
				break
			}
		}
		w.Close()
	}
}

// Every record has a time to live, and old ones are deleted now and then.
func TestLocksLeaveNothing(t *testing.T) {
	url := sharedServer(t)
	b := backend(t, url)
	for range 150 {
		token := dchannel.NewID()
		require.True(t, acquire(t, b, "a", token, hour).Mine)
		_, err := b.Release(within(t), "a", token)
		require.NoError(t, err)
	}
	js, err := jetstream.New(connect(t, url))
	require.NoError(t, err)
	stream, err := js.Stream(within(t), t.Name())
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		info, err := stream.Info(within(t))
		return err == nil && info.State.Msgs < 1+2*64
	}, patience, 10*time.Millisecond)
	last, err := stream.GetLastMsgForSubject(within(t), t.Name()+".log.lock:a")
	require.NoError(t, err)
	ttl, err := time.ParseDuration(last.Header.Get("Nats-TTL"))
	require.NoError(t, err)
	require.Equal(t, 25*hour, ttl)
}

// Any of three servers answers, and none of them from before what the others were told.
func TestLocksInACluster(t *testing.T) {
	servers := testserver.NATSClusterForTest(t, 3, testserver.NATSConfig{})
	var all []*nats.Backend
	for _, s := range servers {
		all = append(all, backend(t, s.URL(), nats.WithReplicas(3)))
	}
	var last uint64
	for i := range 60 {
		token := dchannel.NewID()
		one, two := all[i%3], all[(i+1)%3]
		s := insistLock(t, func() (dchannel.LockState, error) {
			return one.Acquire(within(t), "a", dchannel.Lease{Token: token, TTL: hour})
		})
		require.True(t, s.Held && s.Mine && s.Fence > last, "%+v", s)
		last = s.Fence
		s = insistLock(t, func() (dchannel.LockState, error) { return two.LockState(within(t), "a") })
		require.True(t, s.Held && s.Fence == last, "%+v", s)
		s = insistLock(t, func() (dchannel.LockState, error) { return one.Release(within(t), "a", token) })
		require.True(t, !s.Held && s.Mine && ends(s, dchannel.LockReleased), "%+v", s)
		s = insistLock(t, func() (dchannel.LockState, error) { return two.LockState(within(t), "a") })
		require.True(t, !s.Held && s.Fence == last, "%+v", s)
	}
}

func TestNoLines(t *testing.T) {
	b := backend(t, sharedServer(t))
	_, err := b.Acquire(within(t), "a", dchannel.Lease{Token: dchannel.NewID(), TTL: hour, Fair: true})
	require.ErrorIs(t, err, errors.ErrUnsupported)
	require.Zero(t, lockState(t, b, "a"))
}
