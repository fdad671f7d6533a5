package dchannel

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// MaxLockTTL bounds the TTL of a lock.
const MaxLockTTL = 365 * 24 * time.Hour

// LockOption changes one LockFor.
type LockOption func(*lockOptions)

type lockOptions struct {
	auto, fair, wait bool
	info             string
}

// WithAutoExtend renews the lock, a third of its TTL after each renewal, until
// CloseLockedUntil. One goroutine does it, while the lock is held. A renewal that fails
// is tried again until the hold's own time is over.
func WithAutoExtend() LockOption { return func(o *lockOptions) { o.auto = true } }

// WithLockInfo sets what others see of the holder, in LockedError.Info and
// LockState.Info: at most MaxLockInfo bytes of UTF-8.
func WithLockInfo(info string) LockOption { return func(o *lockOptions) { o.info = info } }

// WithWait makes LockFor wait, until its context ends, for a lock that is held. It waits
// over outages of the backend too. Those who wait in one process by one backend value
// come in order, and only the first of them asks the backend; between processes there is
// no order, but each gets its turn.
func WithWait() LockOption { return func(o *lockOptions) { o.wait = true } }

// WithFair makes a LockFor that waits line up in the backend: first come, first served,
// across processes. Where the backend cannot do that, LockFor returns
// errors.ErrUnsupported. Without WithWait it changes nothing: nobody who does not wait
// gets past those in line.
func WithFair() LockOption { return func(o *lockOptions) { o.fair = true } }

// LockFor locks the channel for ttl, rounded up to the backend's granularity: nobody
// else's LockFor succeeds until the time is over by the server's clock, the hold is
// ended by CloseLockedUntil, ForceUnlock or the channel's close, or the server loses its
// state. The lock is apart from the channel's messages, and needs no attachment.
//
// If the lock is held, by whomever, this handle included, the error is a *LockedError
// (ErrLocked) at once; WithWait waits instead. While the backend is unavailable LockFor
// tries again, until ctx ends or the time of WithTimeout is over.
//
// Any other error means that the lock is not held by this call, and that what it may
// have left on the server was released. If that release could not be confirmed, the
// error is ErrUncertain too: then the lock may look held until ttl is over. Errors:
// ErrInvalidOption (a ttl that is not in (0, MaxLockTTL], an info that is too long),
// ErrChanClosed, ErrDetached, ErrUnavailable, ErrRefused, ErrBackendClosed,
// errors.ErrUnsupported where the backend has no locks, or that of ctx.
//
// A lock of this kind bounds who works when; it cannot stop a holder that does not know
// that its time is over. What must not be written twice checks [Hold.Fence]:
// docs/locks.md shows how.
func (c *Channel) LockFor(ctx context.Context, ttl time.Duration, opts ...LockOption) (*Hold, error) {
	hold, err := c.h.lockFor(ctx, ttl, opts)
	var locked *LockedError
	if errors.As(err, &locked) {
		return nil, locked
	}
	return hold, c.h.wrap("lock", err)
}

// CloseLockedUntil ends the tracking of the channel's lock duration: the hold that this
// handle's LockFor began. Auto-extension stops, and is over when CloseLockedUntil
// returns; the hold's context ends; then the lock is released, in one step, if it is
// still the hold's, and those who wait for it are woken. The channel stays open, and
// nothing changes for those who listen.
//
// It returns nil when the lock was released, by this call or an earlier one, when none
// was started, and when the channel is closed. ErrLockExpired means that the time was
// over before, and ErrLockLost that somebody else has had the lock since, or that it was
// ended by force: what was done under the lock may not have been done alone. Both are
// told once. ErrUnavailable means that the backend is away: the hold is over, for this
// process, and on the server it ends with its time; calling again tries again. It takes
// at most the time of WithTimeout.
func (c *Channel) CloseLockedUntil() error { return c.CloseLockedUntilContext(context.Background()) }

// CloseLockedUntilContext is CloseLockedUntil with a context. If that ends first the
// error is also ErrUncertain, and the release goes on in the background.
func (c *Channel) CloseLockedUntilContext(ctx context.Context) error {
	return c.h.wrap("unlock", c.h.unlock(ctx))
}

// LockedUntil returns for how long the channel is still locked, by the server's clock,
// rounded up to a millisecond: 0 if, and only if, it is not locked.
func (c *Channel) LockedUntil(ctx context.Context) (time.Duration, error) {
	st, err := c.h.lockState(ctx)
	return st.Remaining, c.h.wrap("read the lock of", err)
}

// LockStatus describes the channel's lock, and who holds it. Mine says that this
// handle does.
func (c *Channel) LockStatus(ctx context.Context) (LockState, error) {
	st, err := c.h.lockState(ctx)
	return st, c.h.wrap("read the lock of", err)
}

// WaitUnlocked waits until the lock that is held now is not held any more, and tells how
// that came about: LockReleased, LockExpired, LockForced or LockClosed. It is LockNone
// if the channel is not locked, and LockSuperseded if the backend no longer knows.
// Somebody else may hold the lock by then.
//
// While the backend is unavailable it waits. Errors: that of ctx, ErrDetached,
// ErrInvalidName, ErrInvalidOption, ErrRefused, ErrBackendClosed, errors.ErrUnsupported.
func (c *Channel) WaitUnlocked(ctx context.Context) (LockOutcome, error) {
	return c.WaitFence(ctx, 0)
}

// WaitFence is WaitUnlocked for the generation with the given fence, as a LockedError
// has it: so that nothing is missed between a LockFor that failed and the wait. Fence 0
// stands for the one that is held now.
func (c *Channel) WaitFence(ctx context.Context, fence uint64) (LockOutcome, error) {
	o, err := c.h.waitFence(ctx, fence)
	return o, c.h.wrap("wait for the lock of", err)
}

// ForceUnlock ends the generation with the given fence, whoever holds it; 0 stands for
// the one that is held now. The holder is told when it next extends or ends its hold,
// not at once: it may still be at work. ErrNotHeld if that generation is not held (any
// more).
func (c *Channel) ForceUnlock(ctx context.Context, fence uint64) error {
	return c.h.wrap("force the lock of", c.h.forceUnlock(ctx, fence))
}

// lockable returns the backend's locks.
func (h *handle) lockable() (Locker, error) {
	if h.invalid != nil {
		return nil, h.invalid
	}
	lk, ok := h.backend.(Locker)
	if !ok {
		return nil, fmt.Errorf("%w: the backend %T has no locks", errors.ErrUnsupported, h.backend)
	}
	if h.detached.Load() {
		return nil, ErrDetached
	}
	return lk, nil
}

// retrying calls op until it succeeds, fails for good, or ctx or limit is over. uncertain
// tells that one of the calls may have had an effect that is not known; limit 0 stands
// for no limit.
func retrying(ctx context.Context, limit time.Duration, op func(ctx context.Context) error) (uncertain bool, err error) {
	outer := ctx
	if limit > 0 {
		var done context.CancelFunc
		ctx, done = context.WithTimeoutCause(ctx, limit, errTimeout)
		defer done()
	}
	var wait backoff
	var last error // of the latest call that was not cut off
	for {
		if outer.Err() != nil {
			return uncertain, cutShort(outer, last)
		}
		call, done := context.WithTimeout(ctx, attempt)
		err = op(call)
		done()
		switch {
		case err == nil:
			return uncertain, nil
		case errors.Is(err, ErrUncertain), !final(err) && !errors.Is(err, ErrUnavailable) && ctx.Err() == nil:
			uncertain = true
		case final(err):
			return uncertain, err
		}
		if ctx.Err() == nil {
			last = err
		}
		if !wait.sleep(ctx) {
			if outer.Err() != nil {
				return uncertain, cutShort(outer, last)
			}
			if last == nil {
				last = errors.New("no answer")
			}
			return uncertain, fmt.Errorf("%w: %w: %w", ErrUnavailable, errTimeout, certainly(last))
		}
	}
}

// cutShort is the error of a call whose context has ended.
func cutShort(ctx context.Context, last error) error {
	if last != nil {
		return fmt.Errorf("%w (%w)", ctx.Err(), certainly(last))
	}
	return ctx.Err()
}

func (h *handle) lockState(ctx context.Context) (st LockState, err error) {
	lk, err := h.lockable()
	if err != nil {
		return st, err
	}
	_, err = retrying(ctx, h.o.timeout, func(ctx context.Context) (err error) {
		st, err = lk.LockState(ctx, h.name)
		return err
	})
	if err != nil {
		return LockState{}, err
	}
	hold := h.holding()
	st.Mine = st.Held && hold != nil && hold.fence == st.Fence
	return st, nil
}

func (h *handle) forceUnlock(ctx context.Context, fence uint64) error {
	lk, err := h.lockable()
	if err != nil {
		return err
	}
	if fence == 0 { // else a retry could end the next one
		st, err := h.lockState(ctx)
		if err != nil {
			return err
		}
		if !st.Held {
			return fmt.Errorf("%w: the channel is not locked", ErrNotHeld)
		}
		fence = st.Fence
	}
	var st LockState
	uncertain, err := retrying(ctx, h.o.timeout, func(ctx context.Context) (err error) {
		st, err = lk.EndLock(ctx, h.name, fence, LockForced)
		return err
	})
	if err != nil {
		return unsure(uncertain, err)
	}
	handOver(h.backend, h.name)
	switch o := st.outcome(fence); o {
	case LockForced:
		return nil
	case LockSuperseded:
		return fmt.Errorf("%w: generation %d", ErrNotHeld, fence)
	default:
		return fmt.Errorf("%w: generation %d ended before: %v", ErrNotHeld, fence, o)
	}
}

// unsure adds to err that something may have been done.
func unsure(uncertain bool, err error) error {
	if uncertain && !errors.Is(err, ErrUncertain) {
		return fmt.Errorf("%w: %w", ErrUncertain, certainly(err))
	}
	return err
}

// outcome returns how the generation ended: 0 if it is held, LockSuperseded if that is
// not known.
func (st LockState) outcome(fence uint64) LockOutcome {
	if st.Held && st.Fence == fence {
		return 0
	}
	for _, e := range st.Ended {
		if e.Fence == fence {
			return e.Outcome
		}
	}
	return LockSuperseded
}
