package dmutex_test

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/memory"
	"github.com/dchannel/dchannel/dmutex"
)

// token is what the callers of a Do share: a value, and a storage that checks fences.
type token struct {
	mu        sync.Mutex
	value     string
	fence     uint64
	reads     atomic.Int64
	refreshes atomic.Int64
}

func (k *token) read(context.Context) (string, bool, error) {
	k.reads.Add(1)
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.value, k.value != "", nil
}

func (k *token) write(fence uint64, value string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if fence < k.fence {
		return errStale
	}
	k.fence, k.value = fence, value
	return nil
}

var (
	errStale = errors.New("a later fence was seen")
	errTest  = errors.New("refresh failed")
)

// refresh takes its time.
func (k *token) refresh(takes time.Duration) func(context.Context, uint64) (string, error) {
	return func(ctx context.Context, fence uint64) (string, error) {
		k.refreshes.Add(1)
		t := time.NewTimer(takes)
		defer t.Stop()
		select {
		case <-t.C:
			return "new", k.write(fence, "new")
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
}

func TestDoRefreshesOnceForAll(t *testing.T) {
	for _, processes := range []int{1, 5, 50} {
		bubble(t, func(t *testing.T, s *memory.Store) {
			var ms []*dmutex.Mutex
			for range processes {
				ms = append(ms, process(t, s, time.Second, dmutex.WithAutoExtend()))
			}
			var k token
			var wg sync.WaitGroup
			began := time.Now()
			for i := range 50 {
				wg.Go(func() {
					v, err := dmutex.Do(t.Context(), ms[i%processes], k.read, k.refresh(3*time.Second))
					assert.NoError(t, err)
					assert.Equal(t, "new", v)
				})
			}
			wg.Wait()
			require.Equal(t, 3*time.Second, time.Since(began), "who waits is told at once")
			require.Equal(t, int64(1), k.refreshes.Load())
			require.LessOrEqual(t, k.reads.Load(), int64(50+1+49))
			left, err := ms[0].LockedUntil(t.Context())
			require.NoError(t, err)
			require.Zero(t, left)
		})
	}
}

// A holder that dies is waited for until its time is over, and not longer. Here it hangs,
// which is the same to the others, and wakes up late, which is worse.
func TestDoIsTakenOverFromAHolderThatDies(t *testing.T) {
	for _, same := range []bool{true, false} {
		bubble(t, func(t *testing.T, s *memory.Store) {
			m := process(t, s, 10*time.Second)
			other := m
			if !same {
				other = process(t, s, 10*time.Second)
			}
			var k token
			var wg sync.WaitGroup
			wake := make(chan struct{})
			wg.Go(func() {
				v, err := dmutex.Do(t.Context(), m, k.read, func(ctx context.Context, fence uint64) (string, error) {
					<-wake
					assert.ErrorIs(t, context.Cause(ctx), dchannel.ErrLockExpired)
					err := k.write(fence, "old")
					assert.ErrorIs(t, err, errStale)
					return "old", err
				})
				assert.NoError(t, err, "what counts is what read finds")
				assert.Equal(t, "new", v)
			})
			synctest.Wait()
			began := time.Now()
			for range 20 {
				wg.Go(func() {
					v, err := dmutex.Do(t.Context(), other, k.read, k.refresh(time.Second))
					assert.NoError(t, err)
					assert.Equal(t, "new", v)
					assert.Equal(t, 11*time.Second+5*time.Millisecond, time.Since(began))
				})
			}
			time.Sleep(20 * time.Second)
			close(wake)
			wg.Wait()
			require.Equal(t, int64(1), k.refreshes.Load())
		})
	}
}

func TestDoEndsARefreshThatLosesItsLock(t *testing.T) {
	for _, c := range []struct {
		how    string
		opts   []dmutex.Option
		force  bool
		within time.Duration
		cause  error
	}{
		{"its time is over", nil, false, 9900 * time.Millisecond, dchannel.ErrLockExpired},
		{"forced, watched", []dmutex.Option{dmutex.WithLossWatch()}, true, 0, dchannel.ErrLockLost},
		{"forced, renewed", []dmutex.Option{dmutex.WithAutoExtend()}, true, 10 * time.Second / 3, dchannel.ErrLockLost},
	} {
		t.Run(c.how, func(t *testing.T) {
			bubble(t, func(t *testing.T, s *memory.Store) {
				m, other := process(t, s, 10*time.Second, c.opts...), process(t, s, time.Second)
				var k token
				var wg sync.WaitGroup
				began := time.Now()
				wg.Go(func() {
					_, err := dmutex.Do(t.Context(), m, k.read, k.refresh(time.Hour))
					assert.ErrorIs(t, err, context.Canceled)
					assert.ErrorIs(t, err, c.cause)
					assert.ErrorAs(t, err, new(*dmutex.ErrFailedToUnlock))
				})
				synctest.Wait()
				if c.force {
					require.NoError(t, other.ForceUnlock(t.Context(), 0))
				}
				wg.Wait()
				require.Equal(t, c.within, time.Since(began))
			})
		})
	}
}

func TestDoPassesErrorsOn(t *testing.T) {
	bubble(t, func(t *testing.T, s *memory.Store) {
		m := process(t, s, time.Minute)
		var k token
		ctx := t.Context()
		calls := 0
		failing := func(context.Context, uint64) (string, error) { calls++; return "", errTest }
		_, err := dmutex.Do(ctx, m, func(context.Context) (string, bool, error) { return "", false, errTest }, failing)
		require.Equal(t, errTest, err)
		require.Zero(t, calls)
		_, err = dmutex.Do(ctx, m, k.read, failing)
		require.Equal(t, errTest, err, "as it is")
		require.Equal(t, 1, calls)

		// What came between looking and locking is seen.
		looks := 0
		v, err := dmutex.Do(ctx, m, func(context.Context) (string, bool, error) { looks++; return "v", looks == 2, nil }, failing)
		require.NoError(t, err)
		require.Equal(t, "v", v)
		require.Equal(t, 1, calls)

		// An error about another lock is not mistaken for one about this.
		foreign := &dchannel.LockedError{Channel: "other", Fence: 1}
		_, err = dmutex.Do(ctx, m, k.read, func(context.Context, uint64) (string, error) { return "", foreign })
		require.Equal(t, error(foreign), err)

		require.NoError(t, m.Lock())
		short, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		_, err = dmutex.Do(short, m, k.read, failing)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorAs(t, err, new(*dmutex.ErrFailedToLock))
		require.NoError(t, m.Unlock())

		_, err = dmutex.Do(ctx, dmutex.New("k", 0, s.Backend()), k.read, failing)
		require.ErrorIs(t, err, dchannel.ErrInvalidOption)
		_, err = dmutex.Do(ctx, dmutex.New("k", 1, struct{ dchannel.Backend }{s.Backend()}), k.read, failing)
		require.ErrorIs(t, err, errors.ErrUnsupported)
		require.Equal(t, 1, calls)
	})
}

func TestDoUnlocksWhateverHappens(t *testing.T) {
	bubble(t, func(t *testing.T, s *memory.Store) {
		m := process(t, s, time.Minute, dmutex.WithAutoExtend(), dmutex.WithLossWatch())
		var k token
		free := func() {
			left, err := m.LockedUntil(t.Context())
			require.NoError(t, err)
			require.Zero(t, left)
		}
		require.Panics(t, func() {
			_, _ = dmutex.Do(t.Context(), m, k.read, func(context.Context, uint64) (string, error) { panic("!") })
		})
		free()
		var wg sync.WaitGroup
		wg.Go(func() {
			_, _ = dmutex.Do(t.Context(), m, k.read, func(context.Context, uint64) (string, error) { runtime.Goexit(); return "", nil })
		})
		wg.Wait()
		free()
		ctx, cancel := context.WithCancel(t.Context())
		_, err := dmutex.Do(ctx, m, k.read, func(ctx context.Context, _ uint64) (string, error) {
			cancel()
			return "", ctx.Err()
		})
		require.Equal(t, context.Canceled, err)
		synctest.Wait()
		free()

		// The server being away when all is done is no reason to lose the value.
		b := s.Backend()
		m2 := dmutex.New("k", time.Minute, b, dmutex.WithTimeout(time.Second))
		v, err := dmutex.Do(t.Context(), m2, k.read, func(_ context.Context, fence uint64) (string, error) {
			b.Cut(nil)
			return "new", k.write(fence, "new")
		})
		require.NoError(t, err)
		require.Equal(t, "new", v)
		time.Sleep(time.Minute)
		free()
		require.NoError(t, m2.Close())
		require.NoError(t, b.Close())
	})
}

// meanwhile is a backend for which something happens before its first watch of a lock.
type meanwhile struct {
	*memory.Backend
	happens func()
	once    sync.Once
}

func (m *meanwhile) WatchLock(ctx context.Context, channel string, hint func()) (dchannel.Subscription, error) {
	m.once.Do(m.happens)
	return m.Backend.WatchLock(ctx, channel, hint)
}

func TestDoWaitsForTheHolderThatItMet(t *testing.T) {
	bubble(t, func(t *testing.T, s *memory.Store) {
		first, second := process(t, s, time.Minute), process(t, s, time.Minute)
		var k token
		require.NoError(t, first.Lock())
		b := &meanwhile{Backend: s.Backend(), happens: func() {
			assert.NoError(t, k.write(first.Fence(), "new"))
			assert.NoError(t, first.Unlock())
			assert.NoError(t, second.Lock())
		}}
		m := dmutex.New("k", time.Minute, b)
		began := time.Now()
		v, err := dmutex.Do(t.Context(), m, k.read, k.refresh(time.Second))
		require.NoError(t, err)
		require.Equal(t, "new", v)
		require.Zero(t, time.Since(began), "the next holder's time is not waited for")
		require.NoError(t, second.Unlock())
		require.NoError(t, m.Close())
		require.NoError(t, b.Close())
	})
}
