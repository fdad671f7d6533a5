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

// The counter has no lock of its own: the race detector and the sum tell whether one at a
// time is at it.
func TestAHundredGoroutinesCount(t *testing.T) {
	for name, opts := range map[string][]dmutex.Option{
		"plain": nil, "renewed": {dmutex.WithAutoExtend()}, "fair": {dmutex.WithFair()}, "watched": {dmutex.WithLossWatch()},
	} {
		for _, processes := range []int{1, 4} {
			t.Run(name, func(t *testing.T) {
				bubble(t, func(t *testing.T, s *memory.Store) {
					var ms []*dmutex.Mutex
					for range processes {
						ms = append(ms, process(t, s, time.Minute, opts...))
					}
					counter, last := 0, uint64(0)
					var wg sync.WaitGroup
					began := time.Now()
					for i := range 100 {
						wg.Go(func() {
							m := ms[i%processes]
							for range 5 {
								if !assert.NoError(t, m.Lock()) {
									return
								}
								assert.Greater(t, m.Fence(), last)
								last = m.Fence()
								n := counter
								time.Sleep(time.Millisecond)
								counter = n + 1
								assert.NoError(t, m.Unlock())
							}
						})
					}
					wg.Wait()
					require.Equal(t, 500, counter)
					t.Logf("%d processes: 500 turns of 1ms in %v", processes, time.Since(began))
					synctest.Wait()
					require.Zero(t, s.LockWatches("k"))
				})
			})
		}
	}
}

// A process in which many wait does not keep the lock from another one.
func TestOtherProcessesGetTheirTurn(t *testing.T) {
	bubble(t, func(t *testing.T, s *memory.Store) {
		crowd, loner := process(t, s, time.Minute), process(t, s, time.Minute)
		var wg sync.WaitGroup
		stop := make(chan struct{})
		for range 50 {
			wg.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					if !assert.NoError(t, crowd.Lock()) {
						return
					}
					time.Sleep(time.Millisecond)
					assert.NoError(t, crowd.Unlock())
				}
			})
		}
		time.Sleep(10 * time.Millisecond)
		began := time.Now()
		for range 20 {
			require.NoError(t, loner.Lock())
			time.Sleep(time.Millisecond)
			require.NoError(t, loner.Unlock())
			time.Sleep(1500 * time.Microsecond) // the crowd has it again
		}
		t.Logf("20 turns among 50 others in %v", time.Since(began))
		require.Less(t, time.Since(began), 5*time.Second)
		close(stop)
		wg.Wait()
	})
}

// unfair is a backend that cannot keep a line.
type unfair struct{ *memory.Backend }

func (u unfair) Acquire(ctx context.Context, channel string, l dchannel.Lease) (dchannel.LockState, error) {
	if l.Fair {
		return dchannel.LockState{}, errors.ErrUnsupported
	}
	return u.Backend.Acquire(ctx, channel, l)
}

func TestFairIsRefusedWhereItCannotBe(t *testing.T) {
	bubble(t, func(t *testing.T, s *memory.Store) {
		b := s.Backend()
		m := dmutex.New("k", time.Second, unfair{b}, dmutex.WithFair())
		err := m.Lock()
		require.ErrorIs(t, err, errors.ErrUnsupported)
		require.ErrorAs(t, err, new(*dmutex.ErrFailedToLock))
		require.NoError(t, m.TryLock())
		require.NoError(t, m.Unlock())
		require.NoError(t, m.Close())
		require.NoError(t, b.Close())
	})
}

func TestFairIsFirstComeFirstServed(t *testing.T) {
	bubble(t, func(t *testing.T, s *memory.Store) {
		holder := process(t, s, time.Minute)
		require.NoError(t, holder.Lock())
		var order []int
		var wg sync.WaitGroup
		for i := range 10 {
			m := process(t, s, time.Minute, dmutex.WithFair())
			wg.Go(func() {
				if assert.NoError(t, m.Lock()) {
					order = append(order, i)
					assert.NoError(t, m.Unlock())
				}
			})
			synctest.Wait()
		}
		h, err := holder.Holder(t.Context())
		require.NoError(t, err)
		require.Equal(t, 10, h.Waiting)
		require.ErrorIs(t, process(t, s, time.Second).TryLock(), dchannel.ErrLocked)
		require.NoError(t, holder.Unlock())
		wg.Wait()
		require.Equal(t, []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, order)
	})
}
