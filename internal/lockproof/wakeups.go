package lockproof

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
)

// WakeUps ends a lock right behind a LockFor that failed with ErrLocked, and waits for
// the generation that this one has told of. The end comes before the wait, during it,
// behind its watch, or behind its read, by release, by force or by expiry, and in half
// of the rounds somebody else holds the lock again at once. It prints how many waits did
// not end, and how many answers to "released, or expired?" were wrong. connect returns a
// new connection to the same server; rounds that expire take ttl.
func WakeUps(t *testing.T, connect func() dchannel.Backend, rounds int, ttl time.Duration) {
	const parallel = 10
	w := &wakeUps{ttl: ttl, holding: connect(), hooks: map[string]map[string]func(){}}
	var err error
	w.waiting, err = spy(connect())
	require.NoError(t, err)
	naive, err := w.naive(t.Context(), 50)
	require.NoError(t, err)
	w.waiting.onWatch = func(channel string) { w.reached(channel, "watch") }
	w.waiting.onState = func(channel string, _ dchannel.LockState) { w.reached(channel, "read") }
	var wg sync.WaitGroup
	for part := range parallel {
		wg.Go(func() {
			channel := fmt.Sprintf("wake-%d", part)
			for n := part; n < rounds; n += parallel {
				if err := w.round(t.Context(), channel, n); err != nil {
					t.Errorf("round %d: %v", n, err)
					return
				}
			}
		})
	}
	wg.Wait()
	t.Logf("%d rounds (%v): missed wake-ups %d, wrong answers %d; woken after the end of a lock: %v;"+
		" who looks first and then watches misses %d of 50", w.done, w.kinds, w.missed, w.wrong, w.woken, naive)
	assert.Equal(t, rounds, w.done)
	assert.Zero(t, w.missed)
	assert.Zero(t, w.wrong)
}

// naive counts the releases that are missed by who looks at the lock, and then watches it.
func (w *wakeUps) naive(ctx context.Context, rounds int) (missed int, err error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	holder := dchannel.New("naive", w.holding)
	for range rounds {
		if _, err := holder.LockFor(ctx, time.Minute); err != nil {
			return 0, err
		}
		if st, err := w.waiting.LockState(ctx, "naive"); err != nil || !st.Held {
			return 0, fmt.Errorf("the lock is not held: %w", err)
		}
		if err := holder.CloseLockedUntil(); err != nil {
			return 0, err
		}
		hinted := make(chan struct{}, 1)
		sub, err := w.waiting.WatchLock(ctx, "naive", func() {
			select {
			case hinted <- struct{}{}:
			default:
			}
		})
		if err != nil {
			return 0, err
		}
		select {
		case <-hinted:
		case <-time.After(20 * time.Millisecond): // a push takes one
			missed++
		}
		sub.Close()
	}
	return missed, holder.Detach()
}

type wakeUps struct {
	ttl     time.Duration
	holding dchannel.Backend
	waiting *spied

	mu                  sync.Mutex
	hooks               map[string]map[string]func() // by channel and by what is reached
	done, missed, wrong int
	woken               times
	kinds               map[string]int
}

// reached runs what was to be done then, once.
func (w *wakeUps) reached(channel, what string) {
	w.mu.Lock()
	f := w.hooks[channel][what]
	delete(w.hooks[channel], what)
	w.mu.Unlock()
	if f != nil {
		f()
	}
}

func (w *wakeUps) round(ctx context.Context, channel string, n int) (err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	moment := []string{"before", "during", "watch", "read"}[n/10%4]
	ending := []string{"release", "expiry", "release", "force"}[n/40%4]
	again := n/20%2 == 0

	holder, waiter, next := dchannel.New(channel, w.holding), dchannel.New(channel, w.waiting), dchannel.New(channel, w.holding)
	defer func() { err = errors.Join(err, holder.Detach(), waiter.Detach(), next.Detach()) }()
	var locked *dchannel.LockedError
	var hold *dchannel.Hold
	for locked == nil {
		ttl := time.Minute
		if ending == "expiry" {
			ttl = w.ttl
		}
		if hold, err = holder.LockFor(ctx, ttl); err != nil {
			return fmt.Errorf("lock: %w", err)
		}
		_, err := waiter.LockFor(ctx, time.Minute)
		if !errors.As(err, &locked) {
			if err != nil || ending != "expiry" {
				return fmt.Errorf("lock what is held: %w", err)
			}
			if err := waiter.CloseLockedUntil(); err != nil { // it was too slow, and got it
				return err
			}
		}
	}
	if locked.Fence != hold.Fence() {
		return fmt.Errorf("LockedError tells of generation %d, not %d", locked.Fence, hold.Fence())
	}

	want := dchannel.LockReleased
	var endErr error
	var over time.Time
	ended := make(chan struct{})
	end := func() {
		defer close(ended)
		switch ending {
		case "release":
			endErr = holder.CloseLockedUntil()
		case "force":
			endErr = next.ForceUnlock(ctx, hold.Fence())
		case "expiry": // all by itself
		}
		over = time.Now()
		if again {
			_, err := next.LockFor(ctx, time.Minute, dchannel.WithWait())
			endErr = errors.Join(endErr, err)
		}
	}
	switch ending {
	case "expiry":
		want = dchannel.LockExpired
	case "force":
		want = dchannel.LockForced
	}
	switch moment {
	case "before":
		if ending == "expiry" && !again { // wait for it, so that it is before
			if _, err := next.WaitFence(ctx, hold.Fence()); err != nil {
				return err
			}
		}
		end()
	case "during":
		go end()
	default:
		w.mu.Lock()
		w.hooks[channel] = map[string]func(){moment: end}
		w.mu.Unlock()
	}
	waitCtx, stop := context.WithTimeout(ctx, w.ttl+3*time.Second)
	got, err := waiter.WaitFence(waitCtx, locked.Fence)
	stop()
	at := time.Now()
	missed := errors.Is(err, context.DeadlineExceeded)
	if err != nil && !missed {
		return fmt.Errorf("wait: %w", err)
	}
	select {
	case <-ended:
	case <-ctx.Done():
		return fmt.Errorf("end by %s: %w", ending, ctx.Err())
	}
	if endErr != nil {
		return fmt.Errorf("end by %s: %w", ending, endErr)
	}
	if again {
		if err := next.CloseLockedUntil(); err != nil {
			return fmt.Errorf("unlock: %w", err)
		}
	}
	if err := holder.CloseLockedUntil(); (ending == "release") != (err == nil) || err != nil && !errors.Is(err, dchannel.ErrNotHeld) {
		return fmt.Errorf("unlock what ended by %s: %w", ending, err)
	}

	w.mu.Lock()
	defer w.mu.Unlock()
	w.done++
	if w.kinds == nil {
		w.kinds = map[string]int{}
	}
	w.kinds[ending]++
	switch {
	case missed:
		w.missed++
	case got != want:
		w.wrong++
	case ending != "expiry" && moment != "before":
		w.woken = append(w.woken, max(at.Sub(over), 0))
	}
	return nil
}
