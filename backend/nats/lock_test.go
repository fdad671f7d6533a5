package nats_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/nats"
	"github.com/dchannel/dchannel/internal/testserver"
)

const hour = time.Hour

func acquire(t testing.TB, b *nats.Backend, channel string, token dchannel.ID, ttl time.Duration) dchannel.LockState {
	s, err := b.Acquire(within(t), channel, dchannel.Lease{Token: token, TTL: ttl, Info: "me <" + token.String()[:4] + ">"})
	require.NoError(t, err)
	return s
}

func lockState(t testing.TB, b *nats.Backend, channel string) dchannel.LockState {
	s, err := b.LockState(within(t), channel)
	require.NoError(t, err)
	require.Equal(t, s.Held, s.Remaining > 0, "%+v", s)
	return s
}

// awaitFree waits for the lock to be free, by hints and, as the core does, by the time left.
func awaitFree(t testing.TB, b *nats.Backend, channel string) dchannel.LockState {
	hints := make(chan struct{}, 1)
	w, err := b.WatchLock(within(t), channel, hinted(hints))
	require.NoError(t, err)
	defer w.Close()
	for {
		s := lockState(t, b, channel)
		if !s.Held {
			return s
		}
		select {
		case <-hints:
		case <-time.After(s.Remaining + 50*time.Millisecond):
		case <-time.After(patience):
			require.FailNow(t, "not free in time")
		}
	}
}

func hinted(c chan struct{}) func() {
	return func() {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}

func ends(s dchannel.LockState, all ...dchannel.LockOutcome) bool {
	if len(s.Ended) < len(all) {
		return false
	}
	for i, o := range all {
		if s.Ended[i].Outcome != o || i > 0 && s.Ended[i].Fence >= s.Ended[i-1].Fence {
			return false
		}
	}
	return true
}

func TestLockStates(t *testing.T) {
	b := backend(t, sharedServer(t))
	a, z := dchannel.NewID(), dchannel.NewID()
	require.Zero(t, lockState(t, b, "c/1"))

	one := acquire(t, b, "c/1", a, hour)
	require.True(t, one.Held && one.Mine)
	require.NotZero(t, one.Fence)
	require.Equal(t, []any{hour, hour, "me <" + a.String()[:4] + ">"}, []any{one.TTL, one.Remaining, one.Info})
	again := acquire(t, b, "c/1", a, time.Minute)
	require.InDelta(t, one.Remaining, again.Remaining, float64(5*time.Second))
	again.Remaining = one.Remaining
	require.Equal(t, one, again, "left as it is")
	other := acquire(t, b, "c/1", z, hour)
	require.True(t, other.Held && !other.Mine)
	require.Equal(t, one.Fence, other.Fence)
	require.Equal(t, one.Info, other.Info)
	require.Zero(t, lockState(t, b, "c"))

	// Extend: the owner, to the same time, to more and to less; and somebody else.
	for _, ttl := range []time.Duration{hour, 2 * hour, time.Minute} {
		s, err := b.Extend(within(t), "c/1", a, ttl)
		require.NoError(t, err)
		require.True(t, s.Held && s.Mine)
		require.Equal(t, []any{one.Fence, ttl, ttl}, []any{s.Fence, s.TTL, s.Remaining})
	}
	s, err := b.Extend(within(t), "c/1", z, hour)
	require.NoError(t, err)
	require.True(t, s.Held && !s.Mine)
	require.LessOrEqual(t, s.Remaining, time.Minute)
	s, err = b.Release(within(t), "c/1", z)
	require.NoError(t, err)
	require.True(t, s.Held && !s.Mine)

	// Released, twice; the token has had its generation.
	for range 2 {
		s, err = b.Release(within(t), "c/1", a)
		require.NoError(t, err)
		require.True(t, !s.Held && s.Mine && ends(s, dchannel.LockReleased))
		require.Equal(t, one.Fence, s.Fence)
	}
	s = acquire(t, b, "c/1", a, hour)
	require.True(t, !s.Held && s.Mine)
	s, err = b.Extend(within(t), "c/1", a, hour)
	require.NoError(t, err)
	require.True(t, !s.Held && s.Mine)

	// Forced, by its fence.
	two := acquire(t, b, "c/1", z, hour)
	require.True(t, two.Held && two.Mine && two.Fence > one.Fence)
	require.False(t, acquire(t, b, "c/1", a, hour).Mine, "once is once")
	s, err = b.EndLock(within(t), "c/1", one.Fence, dchannel.LockForced)
	require.NoError(t, err)
	require.True(t, s.Held)
	for range 2 {
		s, err = b.EndLock(within(t), "c/1", two.Fence, dchannel.LockForced)
		require.NoError(t, err)
		require.True(t, !s.Held && ends(s, dchannel.LockForced, dchannel.LockReleased))
	}
	require.True(t, ends(lockState(t, b, "c/1"), dchannel.LockForced, dchannel.LockReleased))
	s, err = b.Release(within(t), "c/1", z)
	require.NoError(t, err)
	require.True(t, !s.Held && s.Mine && ends(s, dchannel.LockForced))

	// Expired, which nobody wrote down; the next generation does.
	three := acquire(t, b, "c/1", dchannel.NewID(), 300*time.Millisecond)
	s = awaitFree(t, b, "c/1")
	require.True(t, ends(s, dchannel.LockExpired, dchannel.LockForced, dchannel.LockReleased))
	require.Equal(t, three.Fence, s.Fence)
	c := dchannel.NewID()
	four := acquire(t, b, "c/1", c, hour)
	require.True(t, four.Mine && ends(four, dchannel.LockExpired, dchannel.LockForced))

	// Closed: who holds it does so until it is ended, and nobody else gets it.
	_, err = b.MarkClosed(within(t), "c/1", dchannel.NewID(), hour)
	require.NoError(t, err)
	_, err = b.Acquire(within(t), "c/1", dchannel.Lease{Token: dchannel.NewID(), TTL: hour})
	require.ErrorIs(t, err, dchannel.ErrChanClosed)
	require.True(t, acquire(t, b, "c/1", c, hour).Held)
	s, err = b.EndLock(within(t), "c/1", 0, dchannel.LockClosed)
	require.NoError(t, err)
	require.True(t, !s.Held && ends(s, dchannel.LockClosed, dchannel.LockExpired))
	require.Equal(t, four.Fence, s.Fence)

	require.NoError(t, b.Remove(within(t), "c/1"))
	require.Zero(t, lockState(t, b, "c/1"))
	require.Greater(t, acquire(t, b, "c/1", dchannel.NewID(), hour).Fence, four.Fence)
}

func TestLockTTLIsInMilliseconds(t *testing.T) {
	b := backend(t, sharedServer(t))
	for asked, want := range map[time.Duration]time.Duration{
		1:                       time.Millisecond,
		1500 * time.Millisecond: 1500 * time.Millisecond,
		2*time.Second + 1:       2*time.Second + time.Millisecond,
		hour:                    hour,
	} {
		name, token := asked.String(), dchannel.NewID()
		s := acquire(t, b, name, token, asked)
		require.Equal(t, []any{want, want}, []any{s.TTL, s.Remaining})
		if want == time.Millisecond {
			continue
		}
		s, err := b.Extend(within(t), name, token, asked)
		require.NoError(t, err)
		require.Equal(t, []any{want, want}, []any{s.TTL, s.Remaining})
		s = lockState(t, b, name)
		require.Equal(t, want, s.TTL)
		require.LessOrEqual(t, s.Remaining, want)
		require.Greater(t, s.Remaining, want-time.Second)
	}
}

// A holder is gone: how late others see it.
func TestLockExpires(t *testing.T) {
	url := sharedServer(t)
	dead, b := backend(t, url), backend(t, url)
	for _, ttl := range []time.Duration{50 * time.Millisecond, 400 * time.Millisecond, 1500 * time.Millisecond} {
		name := ttl.String()
		token := dchannel.NewID()
		acquire(t, dead, name, token, hour)
		_, err := dead.Extend(within(t), name, token, ttl)
		require.NoError(t, err)
		began := time.Now()
		s := awaitFree(t, b, name)
		late := time.Since(began) - ttl
		t.Logf("a lock of %v: seen free %v late", ttl, late)
		require.True(t, ends(s, dchannel.LockExpired))
		require.Greater(t, late, -50*time.Millisecond)
		require.Less(t, late, time.Second)
		s, err = dead.Extend(within(t), name, token, ttl)
		require.NoError(t, err)
		require.True(t, !s.Held && s.Mine && ends(s, dchannel.LockExpired))
		s, err = dead.Release(within(t), name, token)
		require.NoError(t, err)
		require.True(t, !s.Held && s.Mine && ends(s, dchannel.LockExpired))
	}
}

func TestFencesGrow(t *testing.T) {
	s := testserver.NATSForTest(t, testserver.NATSConfig{})
	b := backend(t, s.URL())
	take := func(b *nats.Backend, token dchannel.ID) dchannel.LockState {
		return insistLock(t, func() (dchannel.LockState, error) {
			return b.Acquire(within(t), "a", dchannel.Lease{Token: token, TTL: hour})
		})
	}
	token := dchannel.NewID()
	last := take(b, token)
	require.NoError(t, s.Kill())
	require.NoError(t, s.Restart(within(t)))
	again := take(b, token)
	require.True(t, again.Held && again.Mine)
	require.Equal(t, last.Fence, again.Fence)
	for range 20 {
		_, err := b.Release(within(t), "a", token)
		require.NoError(t, err)
		token = dchannel.NewID()
		next := take(b, token)
		require.Greater(t, next.Fence, last.Fence)
		last = next
	}
	js, err := jetstream.New(connect(t, s.URL()))
	require.NoError(t, err)
	for what, lose := range map[string]func(){
		"wipe": func() {
			require.NoError(t, s.Kill())
			require.NoError(t, s.Wipe())
			require.NoError(t, s.Restart(within(t)))
		},
		"purge": func() {
			stream, err := js.Stream(within(t), t.Name())
			require.NoError(t, err)
			require.NoError(t, stream.Purge(within(t)))
		},
		"delete": func() { require.NoError(t, js.DeleteStream(within(t), t.Name())) },
	} {
		lose()
		gone := insistLock(t, func() (dchannel.LockState, error) { return b.Extend(within(t), "a", token, hour) })
		require.True(t, !gone.Held && !gone.Mine, what)
		for _, b := range []*nats.Backend{b, backend(t, s.URL())} {
			token = dchannel.NewID()
			next := take(b, token)
			require.True(t, next.Held && next.Mine && next.Fence > last.Fence, what)
			last = next
			_, err := b.Release(within(t), "a", token)
			require.NoError(t, err)
		}
	}
}

func TestOneHolderAtATime(t *testing.T) {
	url := sharedServer(t)
	const workers, each = 6, 15
	var mu sync.Mutex
	var fences []uint64
	var wg sync.WaitGroup
	for range workers {
		b := backend(t, url)
		wg.Go(func() {
			for done := 0; done < each; {
				token := dchannel.NewID()
				s, err := b.Acquire(within(t), "a", dchannel.Lease{Token: token, TTL: hour})
				if err != nil {
					t.Error(err)
					return
				}
				if !s.Held || !s.Mine {
					continue
				}
				if !mu.TryLock() {
					t.Error("two holders")
					return
				}
				fences = append(fences, s.Fence)
				_, err = b.Publish(within(t), "a", frame("x")) // the head changes under them
				mu.Unlock()
				if err == nil {
					_, err = b.Release(within(t), "a", token)
				}
				if err != nil {
					t.Error(err)
					return
				}
				done++
			}
		})
	}
	wg.Wait()
	require.Len(t, fences, workers*each)
	for i := 1; i < len(fences); i++ {
		require.Greater(t, fences[i], fences[i-1])
	}
}

func TestAcquireRacesClose(t *testing.T) {
	url := sharedServer(t)
	a, b := backend(t, url), backend(t, url)
	for round := range 30 {
		name := fmt.Sprint(round)
		token := dchannel.NewID()
		got := make(chan error, 1)
		go func() {
			_, err := a.Acquire(context.Background(), name, dchannel.Lease{Token: token, TTL: hour})
			got <- err
		}()
		_, err := b.MarkClosed(within(t), name, dchannel.NewID(), hour)
		require.NoError(t, err)
		err = <-got
		held := lockState(t, b, name).Held
		require.Equal(t, held, err == nil)
		require.Equal(t, !held, errors.Is(err, dchannel.ErrChanClosed), "%v", err)
	}
}
