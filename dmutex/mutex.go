package dmutex

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/dchannel/dchannel"
)

// Mutex is a lock that is shared by everyone who uses its key on the same server. Make
// one with [New]. All methods may be called from any number of goroutines.
//
// Like a sync.Mutex it is not reentrant, and each Lock or TryLock that returns nil is
// followed by one Unlock, also if the lock's time ran out meanwhile: until then, nobody
// else locks this very Mutex value. Other values, here and elsewhere, can.
type Mutex struct {
	key     string
	ttl     time.Duration
	backend dchannel.Backend
	o       options
	invalid error
	ch      *dchannel.Channel

	// gate has an element while a goroutine locks, or has locked, this value. Those who
	// wait for it come in order.
	gate     chan struct{}
	closing  sync.Once
	closed   chan struct{}
	detached error

	mu     sync.Mutex
	hold   *dchannel.Hold // from Lock until Unlock
	last   *dchannel.Hold // the latest, which may be over
	watch  *lossWatch     // of hold
	missed uint64         // the generation at which the latest TryLock failed
	ghost  bool           // the latest release failed: the server may still have the lock
	streak int            // locks in a row that were handed over in this process
}

// What is handed over in this process comes to others no later than every maxStreak
// locks: then the next one here waits for longer than those who wait elsewhere do when
// they see that the lock is free.
const (
	maxStreak = 16
	breather  = 3 * time.Millisecond
)

// New returns a mutex for key, on a channel of that name that nobody closes. It does
// nothing yet; what is wrong with the arguments is the error of the first call. A Mutex
// that is no longer used must be closed.
//
// ttl is for how long a lock is held at most, unless WithAutoExtend renews it; it is
// rounded up to the backend's granularity, and [Mutex.TTL] has the result. It must be
// more than 0 and at most dchannel.MaxLockTTL: longer than the work takes, with room for
// a slow network, and no longer than others can wait for a holder that died.
func New(key string, ttl time.Duration, b dchannel.Backend, opts ...Option) *Mutex {
	m := &Mutex{key: key, ttl: ttl, backend: b, gate: make(chan struct{}, 1), closed: make(chan struct{})}
	for _, opt := range opts {
		if opt == nil {
			m.o.err = errNilOption
			continue
		}
		opt(&m.o)
	}
	m.invalid = m.o.err
	if ttl <= 0 || ttl > dchannel.MaxLockTTL {
		m.invalid = fmt.Errorf("%w: the ttl is %v, want more than 0 and at most %v", dchannel.ErrInvalidOption, ttl, dchannel.MaxLockTTL)
	}
	m.ch = m.channel()
	return m
}

// channel returns one more handle on the key's channel.
func (m *Mutex) channel() *dchannel.Channel {
	if m.o.timeout > 0 {
		return dchannel.New(m.key, m.backend, dchannel.WithTimeout(m.o.timeout))
	}
	return dchannel.New(m.key, m.backend)
}

func (m *Mutex) lockOptions(more ...dchannel.LockOption) []dchannel.LockOption {
	if m.o.auto {
		more = append(more, dchannel.WithAutoExtend())
	}
	if m.o.info != "" {
		more = append(more, dchannel.WithLockInfo(m.o.info))
	}
	if m.o.fair {
		more = append(more, dchannel.WithFair())
	}
	return more
}

// Key returns the mutex's key.
func (m *Mutex) Key() string { return m.key }

// Lock locks m, and waits for as long as that takes: see LockContext.
func (m *Mutex) Lock() error { return m.LockContext(context.Background()) }

// LockContext locks m. While the lock is held, by whomever, or the backend is away, it
// waits, until ctx ends. The goroutines of a process come in order, and those of
// several processes each get their turn; WithFair orders those too.
//
// A goroutine that locks a Mutex which it has locked already waits for itself: the error
// at the end of ctx says so. Every error is an [*ErrFailedToLock].
func (m *Mutex) LockContext(ctx context.Context) error { return m.failedToLock(m.lock(ctx)) }

func (m *Mutex) lock(ctx context.Context) error {
	if err := m.usable(ctx); err != nil {
		return err
	}
	select {
	case m.gate <- struct{}{}:
	default:
		select {
		case m.gate <- struct{}{}:
			if err := m.giveWay(ctx); err != nil {
				<-m.gate
				return err
			}
		case <-m.closed:
			return dchannel.ErrDetached
		case <-ctx.Done():
			if err := m.own(); !errors.Is(err, errLocking) {
				return fmt.Errorf("%w (%w)", ctx.Err(), err)
			}
			return ctx.Err()
		}
	}
	return m.begin(ctx, dchannel.WithWait())
}

// usable tells what no backend need be asked for.
func (m *Mutex) usable(ctx context.Context) error {
	select {
	case <-m.closed:
		return dchannel.ErrDetached
	default:
	}
	if m.invalid != nil {
		return m.invalid
	}
	return ctx.Err()
}

// giveWay lets others have the lock, now and then.
func (m *Mutex) giveWay(ctx context.Context) error {
	m.mu.Lock()
	m.streak++
	long := m.streak >= maxStreak
	if long {
		m.streak = 0
	}
	m.mu.Unlock()
	if !long || m.o.fair {
		return nil
	}
	t := time.NewTimer(breather)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-m.closed:
		return dchannel.ErrDetached
	}
}

// begin locks the channel. The caller has the gate, and on an error it is given back.
func (m *Mutex) begin(ctx context.Context, opts ...dchannel.LockOption) error {
	m.mu.Lock()
	ghost := m.ghost
	m.ghost = false
	m.mu.Unlock()
	if ghost { // or it would be waited for until its time is over
		if err := m.ch.CloseLockedUntilContext(ctx); unsettled(err) {
			m.mu.Lock()
			m.ghost = true
			m.mu.Unlock()
		}
	}
	hold, err := m.ch.LockFor(ctx, m.ttl, m.lockOptions(opts...)...)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil {
		if locked := (*dchannel.LockedError)(nil); errors.As(err, &locked) {
			m.missed = locked.Fence
		}
		<-m.gate
		return err
	}
	m.hold, m.last, m.missed, m.ghost = hold, hold, 0, false
	if m.o.watch {
		m.watch = watchLoss(m.ch, hold)
	}
	return nil
}

// own says why m cannot be locked by one more goroutine.
func (m *Mutex) own() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.hold == nil {
		return errLocking
	}
	if over := context.Cause(m.hold.Context()); over != nil {
		return fmt.Errorf("%w: by this Mutex, whose Unlock has not been called since its lock was over: %w", dchannel.ErrLocked, over)
	}
	locked := &dchannel.LockedError{Channel: m.key, Fence: m.hold.Fence(), Remaining: m.hold.Remaining(), Info: m.o.info}
	m.missed = locked.Fence
	return fmt.Errorf("this Mutex is locked already: %w", locked)
}

// TryLock locks m if it is free: see TryLockContext.
func (m *Mutex) TryLock() error { return m.TryLockContext(context.Background()) }

// TryLockContext locks m if it is free. If it is held, by whomever, the error is
// dchannel.ErrLocked at once, and a WaitUntilUnlocked that follows is about that very
// holder. Every error is an [*ErrFailedToLock].
func (m *Mutex) TryLockContext(ctx context.Context) error { return m.failedToLock(m.tryLock(ctx)) }

func (m *Mutex) tryLock(ctx context.Context) error {
	if err := m.usable(ctx); err != nil {
		return err
	}
	select {
	case m.gate <- struct{}{}:
		return m.begin(ctx)
	default:
		return m.own()
	}
}

// Unlock unlocks m: see UnlockContext. It takes at most the time of WithTimeout.
func (m *Mutex) Unlock() error { return m.UnlockContext(context.Background()) }

// UnlockContext unlocks m: Context ends, and those who wait are woken. Any goroutine may
// do that for the one that locked.
//
// nil means that the lock was held until now. dchannel.ErrLockExpired and
// dchannel.ErrLockLost mean that it was over before, and that what was done under it may
// not have been done alone. Whatever the error, an [*ErrFailedToUnlock], m is unlocked for
// this process; on the server a lock that could not be released ends with its time. If
// ctx ends first, the release goes on in the background.
func (m *Mutex) UnlockContext(ctx context.Context) error { return m.failedToUnlock(m.unlock(ctx)) }

func (m *Mutex) unlock(ctx context.Context) error {
	m.mu.Lock()
	hold, watch := m.hold, m.watch
	m.hold, m.watch = nil, nil
	m.mu.Unlock()
	if hold == nil {
		if m.invalid != nil {
			return m.invalid
		}
		return errNotLocked
	}
	defer func() { <-m.gate }()
	over := context.Cause(hold.Context())
	err := m.ch.CloseLockedUntilContext(ctx)
	watch.join()
	m.mu.Lock()
	m.ghost = unsettled(err)
	m.mu.Unlock()
	if err == nil && errors.Is(over, dchannel.ErrChanClosed) {
		return over // which the channel has no need to tell of
	}
	return err
}

// Close gives back what m has. A lock that m holds is released, and what waits on m
// returns dchannel.ErrDetached. For others nothing changes. Closing again is nil.
func (m *Mutex) Close() error {
	m.closing.Do(func() {
		close(m.closed)
		m.detached = m.ch.Detach()
		m.mu.Lock()
		watch := m.watch
		m.mu.Unlock()
		watch.join()
		if errors.Is(m.detached, dchannel.ErrInvalidName) || errors.Is(m.detached, dchannel.ErrInvalidOption) {
			m.detached = nil // there was nothing to give back
		}
		m.detached = m.failedToUnlock(m.detached)
	})
	return m.detached
}

// lossWatch is a goroutine of WithLossWatch.
type lossWatch struct{ over chan struct{} }

// watchLoss ends the hold's context when its generation has ended in the backend.
func watchLoss(ch *dchannel.Channel, hold *dchannel.Hold) *lossWatch {
	w := &lossWatch{make(chan struct{})}
	go func() {
		defer close(w.over)
		if _, err := ch.WaitFence(hold.Context(), hold.Fence()); err == nil {
			// An extension of what has ended does nothing, and finds out why.
			_, _ = hold.Extend(hold.Context(), hold.TTL())
		}
	}()
	return w
}

// join waits until the watch is over; the hold is.
func (w *lossWatch) join() {
	if w != nil {
		<-w.over
	}
}
