package dmutex_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/memory"
	"github.com/dchannel/dchannel/dmutex"
)

func TestOneHoldsAndTheOthersAreTold(t *testing.T) {
	bubble(t, func(t *testing.T, s *memory.Store) {
		a, b := process(t, s, time.Minute, dmutex.WithInfo("a")), process(t, s, time.Minute)
		ctx := t.Context()
		require.Zero(t, a.Fence())
		require.ErrorIs(t, context.Cause(a.Context()), dchannel.ErrNotHeld)
		require.NoError(t, a.Lock())
		require.NotZero(t, a.Fence())
		require.NoError(t, a.Context().Err())
		require.Equal(t, time.Minute-600*time.Millisecond, a.Remaining())

		err := b.TryLock()
		var failed *dmutex.ErrFailedToLock
		require.ErrorAs(t, err, &failed)
		require.Equal(t, "k", failed.Key)
		require.ErrorIs(t, err, dchannel.ErrLocked)
		require.EqualError(t, err, `dmutex: failed to lock "k": dchannel: "k" is locked for 1m0s by "a"`)
		var locked *dchannel.LockedError
		require.ErrorAs(t, err, &locked)
		require.Equal(t, a.Fence(), locked.Fence)

		left, err := b.LockedUntil(ctx)
		require.NoError(t, err)
		require.Equal(t, time.Minute, left)
		want := dmutex.Holder{Held: true, Info: "a", Fence: a.Fence(), TTL: time.Minute, Remaining: time.Minute}
		h, err := b.Holder(ctx)
		require.NoError(t, err)
		require.Equal(t, want, h)
		h, err = a.Holder(ctx)
		require.NoError(t, err)
		want.Mine = true
		require.Equal(t, want, h)

		held, fence := a.Context(), a.Fence()
		require.NoError(t, a.Unlock())
		require.ErrorIs(t, context.Cause(held), dchannel.ErrLockReleased)
		require.ErrorIs(t, context.Cause(a.Context()), dchannel.ErrLockReleased)
		require.Zero(t, a.Fence())
		require.Zero(t, a.Remaining())
		h, err = b.Holder(ctx)
		require.NoError(t, err)
		require.Zero(t, h)

		require.NoError(t, b.TryLock())
		require.Greater(t, b.Fence(), fence)
		require.NoError(t, b.Unlock())
	})
}

func TestWaitUntilUnlockedTellsHowItEnded(t *testing.T) {
	for _, c := range []struct {
		how     string
		end     func(t *testing.T, s *memory.Store, holder, other *dmutex.Mutex)
		after   time.Duration
		expired bool
		outcome dchannel.LockOutcome
	}{
		{"released", func(t *testing.T, _ *memory.Store, holder, _ *dmutex.Mutex) {
			require.NoError(t, holder.Unlock())
		}, 0, false, dchannel.LockReleased},
		{"expired", func(*testing.T, *memory.Store, *dmutex.Mutex, *dmutex.Mutex) {}, 10*time.Second + 5*time.Millisecond, true, dchannel.LockExpired},
		{"forced", func(t *testing.T, _ *memory.Store, _, other *dmutex.Mutex) {
			require.NoError(t, other.ForceUnlock(t.Context(), 0))
		}, 0, false, dchannel.LockForced},
		{"closed", func(t *testing.T, _ *memory.Store, holder, _ *dmutex.Mutex) {
			require.NoError(t, holder.Close())
		}, 0, false, dchannel.LockReleased},
	} {
		t.Run(c.how, func(t *testing.T) {
			bubble(t, func(t *testing.T, s *memory.Store) {
				holder, waiter, late, other := process(t, s, 10*time.Second), process(t, s, time.Second), process(t, s, time.Second), process(t, s, time.Second)
				require.NoError(t, holder.Lock())
				require.ErrorIs(t, late.TryLock(), dchannel.ErrLocked)
				began := time.Now()
				var wg sync.WaitGroup
				wg.Go(func() {
					expired, err := waiter.WaitUntilUnlocked(t.Context())
					assert.NoError(t, err)
					assert.Equal(t, c.expired, expired)
					assert.Equal(t, c.after, time.Since(began))
				})
				synctest.Wait()
				c.end(t, s, holder, other)
				wg.Wait()
				// Whoever was told of this very holder learns of its end, also when there
				// is another one already; once.
				require.NoError(t, other.Lock())
				o, err := late.WaitOutcome(t.Context())
				require.NoError(t, err)
				require.Equal(t, c.outcome, o)
				expired, err := late.WaitUntilUnlocked(t.Context())
				require.NoError(t, err)
				require.True(t, expired)
				expired, err = late.WaitUntilUnlocked(t.Context())
				require.NoError(t, err)
				require.False(t, expired, "nobody holds the lock")
				require.ErrorIs(t, other.Unlock(), dchannel.ErrLockExpired)
			})
		})
	}
}

func TestALockThatIsOverIsToldOfByUnlock(t *testing.T) {
	bubble(t, func(t *testing.T, s *memory.Store) {
		a, b := process(t, s, time.Second), process(t, s, time.Minute)
		require.NoError(t, a.Lock())
		fence := a.Fence()
		<-a.Context().Done()
		require.ErrorIs(t, context.Cause(a.Context()), dchannel.ErrLockExpired)
		require.Equal(t, fence, a.Fence(), "a storage refuses it; 0 it might not")
		require.Zero(t, a.Remaining())
		_, err := a.Extend(t.Context())
		require.ErrorIs(t, err, dchannel.ErrLockExpired)
		time.Sleep(time.Second)
		// Until Unlock nobody else gets this value,
		err = a.TryLock()
		require.ErrorIs(t, err, dchannel.ErrLocked)
		require.ErrorIs(t, err, dchannel.ErrLockExpired)
		require.ErrorContains(t, err, "Unlock has not been called")
		err = a.Unlock()
		require.ErrorIs(t, err, dchannel.ErrLockExpired)
		var failed *dmutex.ErrFailedToUnlock
		require.ErrorAs(t, err, &failed)
		require.Equal(t, "k", failed.Key)

		require.NoError(t, a.TryLock())
		time.Sleep(time.Second)
		require.NoError(t, b.TryLock())
		require.ErrorIs(t, a.Unlock(), dchannel.ErrLockLost)
		left, err := b.LockedUntil(t.Context())
		require.NoError(t, err)
		require.Equal(t, time.Minute, left, "a late Unlock ends nobody else's lock")
		require.NoError(t, b.Unlock())
	})
}

func TestALateUnlockInTheSameProcessEndsNobodyElsesLock(t *testing.T) {
	bubble(t, func(t *testing.T, s *memory.Store) {
		m := process(t, s, time.Second)
		require.NoError(t, m.Lock())
		var wg sync.WaitGroup
		wg.Go(func() {
			assert.NoError(t, m.Lock())
			assert.NoError(t, m.Unlock())
		})
		time.Sleep(3 * time.Second)
		require.ErrorIs(t, m.Unlock(), dchannel.ErrLockExpired)
		wg.Wait()
	})
}

func TestLossIsNoticed(t *testing.T) {
	for _, c := range []struct {
		how    string
		opts   []dmutex.Option
		lose   func(t *testing.T, s *memory.Store, m *dmutex.Mutex)
		within time.Duration
		cause  error
	}{
		{"forced, renewed", []dmutex.Option{dmutex.WithAutoExtend()}, force, 4 * time.Second, dchannel.ErrLockLost},
		{"forced, watched", []dmutex.Option{dmutex.WithLossWatch()}, force, 0, dchannel.ErrLockLost},
		{"forced, neither", nil, force, 11880 * time.Millisecond, dchannel.ErrLockExpired},
		{"channel closed, watched", []dmutex.Option{dmutex.WithLossWatch()}, func(t *testing.T, s *memory.Store, _ *dmutex.Mutex) {
			b := s.Backend()
			require.NoError(t, dchannel.New("k", b).Close())
			require.NoError(t, b.Close())
		}, 0, dchannel.ErrChanClosed},
		{"expired early, watched", []dmutex.Option{dmutex.WithLossWatch()}, func(_ *testing.T, s *memory.Store, _ *dmutex.Mutex) {
			s.ExpireLock("k")
		}, 0, dchannel.ErrLockExpired},
		{"server away, renewed", []dmutex.Option{dmutex.WithAutoExtend()}, func(t *testing.T, s *memory.Store, _ *dmutex.Mutex) {
			s.Pause()
			t.Cleanup(s.Resume)
		}, 11880 * time.Millisecond, dchannel.ErrLockExpired},
	} {
		t.Run(c.how, func(t *testing.T) {
			bubble(t, func(t *testing.T, s *memory.Store) {
				m, other := process(t, s, 12*time.Second, c.opts...), process(t, s, time.Second)
				require.NoError(t, m.Lock())
				synctest.Wait()
				began := time.Now()
				c.lose(t, s, other)
				<-m.Context().Done()
				require.LessOrEqual(t, time.Since(began), c.within)
				require.ErrorIs(t, context.Cause(m.Context()), c.cause)
				if c.how == "server away, renewed" {
					require.ErrorIs(t, m.Unlock(), dchannel.ErrUnavailable)
				} else {
					require.ErrorIs(t, m.Unlock(), dchannel.ErrNotHeld)
				}
				require.ErrorIs(t, m.Unlock(), dchannel.ErrNotHeld)
			})
		})
	}
}

func force(t *testing.T, _ *memory.Store, m *dmutex.Mutex) {
	require.NoError(t, m.ForceUnlock(t.Context(), 0))
	err := m.ForceUnlock(t.Context(), 0)
	require.ErrorIs(t, err, dchannel.ErrNotHeld)
	require.ErrorAs(t, err, new(*dmutex.ErrFailedToUnlock))
}

func TestAutoExtendAndExtend(t *testing.T) {
	bubble(t, func(t *testing.T, s *memory.Store) {
		a, b := process(t, s, 3*time.Second, dmutex.WithAutoExtend()), process(t, s, 3*time.Second)
		require.NoError(t, a.Lock())
		for range 100 {
			time.Sleep(time.Second)
			require.ErrorIs(t, b.TryLock(), dchannel.ErrLocked)
		}
		require.NoError(t, a.Unlock())
		require.NoError(t, b.Lock())
		for range 10 {
			time.Sleep(2 * time.Second)
			left, err := b.Extend(t.Context())
			require.NoError(t, err)
			require.Equal(t, 2970*time.Millisecond, left)
		}
		require.NoError(t, b.Unlock())
	})
}

func TestAnOutageAtUnlockLeavesNoGhost(t *testing.T) {
	bubble(t, func(t *testing.T, s *memory.Store) {
		b := s.Backend()
		m := dmutex.New("k", time.Hour, b, dmutex.WithTimeout(time.Second))
		require.NoError(t, m.Lock())
		b.Cut(nil)
		began := time.Now()
		require.ErrorIs(t, m.Unlock(), dchannel.ErrUnavailable)
		require.LessOrEqual(t, time.Since(began), time.Second)
		require.ErrorIs(t, m.TryLock(), dchannel.ErrUnavailable)
		b.Heal()
		require.NoError(t, m.TryLock(), "the next lock first ends the one that is left")
		require.NoError(t, m.Unlock())
		require.NoError(t, m.Close())
		require.NoError(t, b.Close())
	})
}

func TestWhatCannotBeIsSaid(t *testing.T) {
	bubble(t, func(t *testing.T, s *memory.Store) {
		b := s.Backend()
		ctx := t.Context()
		for _, c := range []struct {
			m     *dmutex.Mutex
			is    error
			words string
		}{
			{dmutex.New("k", 0, b), dchannel.ErrInvalidOption, "the ttl is 0s, want more than 0"},
			{dmutex.New("k", -1, b), dchannel.ErrInvalidOption, "the ttl is -1ns, want more than 0"},
			{dmutex.New("k", 2*dchannel.MaxLockTTL, b), dchannel.ErrInvalidOption, "at most"},
			{dmutex.New("k", 1, b, nil), dchannel.ErrInvalidOption, "an option is nil"},
			{dmutex.New("k", 1, b, dmutex.WithTimeout(0)), dchannel.ErrInvalidOption, "WithTimeout(0s)"},
			{dmutex.New("k", 1, b, dmutex.WithInfo(string(make([]byte, 256)))), dchannel.ErrInvalidOption, "256 bytes"},
			{dmutex.New("", 1, b), dchannel.ErrInvalidName, "empty"},
			{dmutex.New("k", 1, nil), dchannel.ErrInvalidOption, "backend"},
			{dmutex.New("k", 1, struct{ dchannel.Backend }{b}), errors.ErrUnsupported, "has no locks"},
		} {
			for _, err := range []error{c.m.Lock(), c.m.TryLock()} {
				require.ErrorIs(t, err, c.is)
				require.ErrorContains(t, err, c.words)
				require.ErrorAs(t, err, new(*dmutex.ErrFailedToLock))
			}
			require.ErrorAs(t, c.m.Unlock(), new(*dmutex.ErrFailedToUnlock))
			require.NoError(t, c.m.Close())
		}
		for _, m := range []*dmutex.Mutex{dmutex.New("k", 0, b), dmutex.New("k", 1, struct{ dchannel.Backend }{b})} {
			_, err := m.LockedUntil(ctx)
			require.Error(t, err)
			_, err = m.WaitUntilUnlocked(ctx)
			require.Error(t, err)
			_, err = m.Holder(ctx)
			require.Error(t, err)
			require.Error(t, m.ForceUnlock(ctx, 0))
		}

		m := dmutex.New("k", 1500*time.Microsecond, b)
		require.Equal(t, 1500*time.Microsecond, m.TTL())
		err := m.Unlock()
		require.ErrorIs(t, err, dchannel.ErrNotHeld)
		require.NotErrorIs(t, err, dchannel.ErrLockExpired)
		require.EqualError(t, err, `dmutex: failed to unlock "k": lock not held: this Mutex is not locked`)
		_, err = m.Extend(ctx)
		require.ErrorIs(t, err, dchannel.ErrNotHeld)
		require.NoError(t, m.Lock())
		require.Equal(t, 2*time.Millisecond, m.TTL(), "rounded up to the backend's milliseconds")

		require.NoError(t, m.Unlock())
		ended, cancel := context.WithCancel(ctx)
		cancel()
		require.ErrorIs(t, m.LockContext(ended), context.Canceled)
		require.ErrorIs(t, m.TryLockContext(ended), context.Canceled)
		require.NoError(t, m.Close())
		require.NoError(t, m.Close())
		require.ErrorIs(t, m.Lock(), dchannel.ErrDetached)
		require.ErrorIs(t, m.TryLock(), dchannel.ErrDetached)
		require.NoError(t, b.Close())
	})
}

func TestLockingTwiceOneValue(t *testing.T) {
	bubble(t, func(t *testing.T, s *memory.Store) {
		m := process(t, s, time.Minute, dmutex.WithInfo("me"))
		require.NoError(t, m.Lock())
		err := m.TryLock()
		require.ErrorIs(t, err, dchannel.ErrLocked)
		require.ErrorContains(t, err, `this Mutex is locked already`)
		var locked *dchannel.LockedError
		require.ErrorAs(t, err, &locked)
		require.Equal(t, m.Fence(), locked.Fence)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err = m.LockContext(ctx)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorContains(t, err, `this Mutex is locked already`)
		require.NoError(t, m.Unlock())
	})
}

func TestCloseEndsWhatWaits(t *testing.T) {
	bubble(t, func(t *testing.T, s *memory.Store) {
		a, b := process(t, s, time.Minute, dmutex.WithAutoExtend(), dmutex.WithLossWatch()), process(t, s, time.Minute)
		require.NoError(t, a.Lock())
		var wg sync.WaitGroup
		for _, m := range []*dmutex.Mutex{a, b, b} { // by the gate, in the backend, by the gate
			wg.Go(func() { assert.ErrorIs(t, m.Lock(), dchannel.ErrDetached) })
		}
		wg.Go(func() {
			_, err := b.WaitUntilUnlocked(t.Context())
			assert.ErrorIs(t, err, dchannel.ErrDetached)
		})
		synctest.Wait()
		err := b.TryLock()
		require.ErrorIs(t, err, dchannel.ErrLocked)
		require.ErrorContains(t, err, "another goroutine is about to lock this Mutex")
		require.NoError(t, b.Close())
		require.NoError(t, a.Close())
		wg.Wait()
		require.ErrorIs(t, context.Cause(a.Context()), dchannel.ErrLockReleased)
		require.NoError(t, a.Unlock(), "what Close has done already")
		left, err := process(t, s, time.Second).LockedUntil(t.Context())
		require.NoError(t, err)
		require.Zero(t, left)
	})
}
