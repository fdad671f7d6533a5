package dmutex

import (
	"context"
	"fmt"
	"time"

	"github.com/dchannel/dchannel"
)

// TTL returns for how long a lock of m is held at most: what New was given, rounded up to
// the backend's granularity as soon as m has been locked for the first time.
func (m *Mutex) TTL() time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.last != nil {
		return m.last.TTL()
	}
	return m.ttl
}

// Fence returns the number of the lock that m holds, its fencing token, from Lock until
// Unlock, even if the lock is lost meanwhile; 0 if m is not locked. A later lock of the
// key has a higher one, whoever takes it, also over a restart of the server.
func (m *Mutex) Fence() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.hold == nil {
		return 0
	}
	return m.hold.Fence()
}

// Remaining returns for how long the lock that m holds surely lasts, by this process's
// clock; 0 if m is not locked or has lost its lock.
func (m *Mutex) Remaining() time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.hold == nil {
		return 0
	}
	return m.hold.Remaining()
}

// Extend sets the end of the lock that m holds to its ttl from now, and returns for how
// long it surely lasts: for work that goes on in steps, instead of WithAutoExtend. An
// error that is dchannel.ErrNotHeld means that the lock is over; after any other one it
// is as it was, or may have been extended on the server (dchannel.ErrUncertain).
func (m *Mutex) Extend(ctx context.Context) (time.Duration, error) {
	m.mu.Lock()
	hold := m.hold
	m.mu.Unlock()
	if hold == nil {
		return 0, fmt.Errorf("dmutex: extend the lock of %q: %w", m.key, errNotLocked)
	}
	return hold.Extend(ctx, m.ttl)
}

// Context returns a context that ends with the lock that m holds, and context.Cause says
// why: dchannel.ErrLockReleased (Unlock), dchannel.ErrLockExpired (its time is over, by
// this process's clock, which is a little early), or dchannel.ErrLockLost (by force, or
// somebody else has it), which is noticed as [WithLossWatch] says. Ask for it after Lock.
// If m is not locked the context has ended, with the cause of the latest lock, or
// dchannel.ErrNotHeld.
func (m *Mutex) Context() context.Context {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.last != nil {
		return m.last.Context()
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(errNotLocked)
	return ctx
}

// LockedUntil returns for how long the key is still locked, by whomever, by the server's
// clock, rounded up to a millisecond: 0 if, and only if, it is not locked.
func (m *Mutex) LockedUntil(ctx context.Context) (time.Duration, error) {
	if m.invalid != nil {
		return 0, m.failed("read the lock of", m.invalid)
	}
	return m.ch.LockedUntil(ctx)
}

// WaitUntilUnlocked waits until the key's lock is not held any more, by the one that holds
// it now, or that held it when TryLock of m failed last; each such failure is used for
// one wait. So nothing is missed between the two calls, and by the return somebody else
// may hold the lock. It returns at once if the lock is free. While the backend is away it
// waits, until ctx ends.
//
// isTTLExpired tells that the holder's time was over before it unlocked: it may have died,
// and what it was to do may not be done. It is false when the lock was released or ended
// by force, was free, or when the backend no longer knows ([Mutex.WaitOutcome] tells
// these apart): look at the result of the holder's work, in any case.
func (m *Mutex) WaitUntilUnlocked(ctx context.Context) (isTTLExpired bool, err error) {
	o, err := m.WaitOutcome(ctx)
	return o == dchannel.LockExpired, err
}

// WaitOutcome is WaitUntilUnlocked, and tells how the lock ended.
func (m *Mutex) WaitOutcome(ctx context.Context) (dchannel.LockOutcome, error) {
	if m.invalid != nil {
		return 0, m.failed("wait for the lock of", m.invalid)
	}
	m.mu.Lock()
	fence := m.missed
	m.mu.Unlock()
	o, err := m.ch.WaitFence(ctx, fence)
	if err == nil {
		m.mu.Lock()
		if m.missed == fence {
			m.missed = 0
		}
		m.mu.Unlock()
	}
	return o, err
}

func (m *Mutex) failed(op string, err error) error {
	return fmt.Errorf("dmutex: %s %q: %w", op, m.key, err)
}

// Holder is who holds a key's lock, at one moment.
type Holder struct {
	// Held says that somebody does. Otherwise all else is zero.
	Held bool
	// Mine says that it is this very Mutex.
	Mine bool
	// Info is what the holder says of itself, by WithInfo.
	Info string
	// Fence is the lock's number.
	Fence uint64
	// TTL is the time that the lock was given last, and Remaining what is left of it, by
	// the server's clock.
	TTL, Remaining time.Duration
	// Waiting is how many stand in line by WithFair, where the backend knows.
	Waiting int
}

// Holder tells who holds the key's lock, and for how long.
func (m *Mutex) Holder(ctx context.Context) (Holder, error) {
	if m.invalid != nil {
		return Holder{}, m.failed("read the lock of", m.invalid)
	}
	st, err := m.ch.LockStatus(ctx)
	if err != nil || !st.Held {
		return Holder{}, err
	}
	return Holder{
		Held: true, Mine: st.Mine, Info: st.Info, Fence: st.Fence,
		TTL: st.TTL, Remaining: st.Remaining, Waiting: st.Waiting,
	}, nil
}

// ForceUnlock ends the lock with the given fence, as [Mutex.Holder] has it, whoever holds
// it; 0 stands for the one that is held now. The holder may still be at work: it learns
// of it as [Mutex.Context] says. The error, an [*ErrFailedToUnlock], is
// dchannel.ErrNotHeld if that lock is not held (any more).
func (m *Mutex) ForceUnlock(ctx context.Context, fence uint64) error {
	if m.invalid != nil {
		return m.failedToUnlock(m.invalid)
	}
	return m.failedToUnlock(m.ch.ForceUnlock(ctx, fence))
}
