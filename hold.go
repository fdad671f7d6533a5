package dchannel

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// Hold is a lock that is held, by [Channel.LockFor], until [Channel.CloseLockedUntil].
type Hold struct {
	h     *handle
	lk    Locker
	token ID
	fence uint64
	auto  bool
	info  string

	ctx    context.Context
	cancel context.CancelCauseFunc
	joined chan struct{} // closed when auto-extension is over; nil without

	mu       sync.Mutex
	asked    time.Duration // the TTL of the latest request
	ttl      time.Duration // what it was rounded up to
	deadline time.Time
	timer    *time.Timer
	over     error // why the hold is over, for this process

	settle sync.Mutex // one release at a time
	told   bool       // under settle: how it ended has been returned
}

// Fence returns the generation's number: the fencing token. A later lock of the channel
// has a higher one, also over a flush or a restart of the server. Where the protected
// thing refuses what comes with a lower fence than it has seen, a holder whose time was
// over without its knowing does no harm.
func (hd *Hold) Fence() uint64 { return hd.fence }

// TTL returns the time that was given last: what was asked for, rounded up to the
// backend's granularity.
func (hd *Hold) TTL() time.Duration {
	hd.mu.Lock()
	defer hd.mu.Unlock()
	return hd.ttl
}

// Remaining returns for how long the hold surely lasts, by this process's clock: its TTL
// since the request, less 1 % or 10 ms, whichever is more, for clocks that run
// differently. 0 when it is over. Time counts while the machine sleeps.
func (hd *Hold) Remaining() time.Duration {
	hd.mu.Lock()
	defer hd.mu.Unlock()
	return hd.left()
}

// Context returns a context that ends with the hold; context.Cause says why: ErrLockExpired
// (its own time is over), ErrLockLost (by force, by somebody else, by the channel's
// close), or ErrLockReleased. A loss is noticed by the next extension, so
// within a third of the TTL with WithAutoExtend.
func (hd *Hold) Context() context.Context { return hd.ctx }

// Extend sets the hold's end to ttl from now, also if that is sooner, and returns for how
// long it surely lasts. While the backend is unavailable it tries again, until ctx ends,
// or the time of WithTimeout or of the hold is over. An error that is ErrNotHeld means
// that the hold is over: ErrLockExpired, ErrLockLost, ErrLockReleased. After any other
// one it is as it was, or, if it is ErrUncertain, may have been extended on the server.
func (hd *Hold) Extend(ctx context.Context, ttl time.Duration) (time.Duration, error) {
	err := checkTTL("Extend", ttl)
	if err == nil {
		err = hd.extend(ctx, ttl)
	}
	return hd.Remaining(), hd.h.wrap("extend the lock of", err)
}

func checkTTL(call string, ttl time.Duration) error {
	if ttl <= 0 || ttl > MaxLockTTL {
		return fmt.Errorf("%w: %s: the ttl is %v, want more than 0 and at most %v", ErrInvalidOption, call, ttl, MaxLockTTL)
	}
	return nil
}

// newHold returns the hold of a generation that was held when st was read, at `at` or
// later.
func newHold(h *handle, lk Locker, l Lease, auto bool, st LockState, at time.Time) *Hold {
	hd := &Hold{h: h, lk: lk, token: l.Token, fence: st.Fence, auto: auto, info: l.Info, asked: l.TTL}
	hd.ctx, hd.cancel = context.WithCancelCause(context.Background())
	hd.mu.Lock()
	defer hd.mu.Unlock()
	hd.renewed(st, at)
	return hd
}

// renewed sets the deadline from a state that is not older than `at`. hd.mu is held.
func (hd *Hold) renewed(st LockState, at time.Time) {
	hd.ttl = st.TTL
	hd.deadline = at.Add(st.Remaining - min(max(st.Remaining/100, 10*time.Millisecond), st.Remaining/2))
	if hd.timer == nil {
		hd.timer = time.AfterFunc(time.Until(hd.deadline), hd.lapsed)
	} else {
		hd.timer.Reset(time.Until(hd.deadline))
	}
}

// left is the time to the deadline. hd.mu is held.
//
// Go's monotonic clock stands still while the machine sleeps, and the wall clock can be
// set back: what comes first counts.
func (hd *Hold) left() time.Duration {
	if hd.over != nil {
		return 0
	}
	now := time.Now()
	return max(0, min(hd.deadline.Sub(now), hd.deadline.Round(0).Sub(now.Round(0))))
}

// lapsed ends the hold if its time is over.
func (hd *Hold) lapsed() {
	hd.mu.Lock()
	left := hd.left()
	if hd.over == nil && left > 0 { // extended meanwhile
		hd.timer.Reset(left)
		hd.mu.Unlock()
		return
	}
	hd.mu.Unlock()
	hd.end(ErrLockExpired)
}

// end ends the hold for this process. The first cause stays.
func (hd *Hold) end(cause error) {
	hd.mu.Lock()
	if hd.over == nil {
		hd.over = cause
		hd.timer.Stop()
	}
	cause = hd.over
	hd.mu.Unlock()
	hd.cancel(cause)
}

// ended returns why the hold is over, nil if it is not.
func (hd *Hold) ended() error {
	hd.mu.Lock()
	over, left := hd.over, hd.left()
	hd.mu.Unlock()
	if over == nil && left == 0 {
		hd.end(ErrLockExpired)
		return ErrLockExpired
	}
	return over
}

func (hd *Hold) extend(ctx context.Context, ttl time.Duration) error {
	if over := hd.ended(); over != nil {
		return over
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	defer context.AfterFunc(hd.ctx, stop)()
	var st LockState
	var at time.Time
	uncertain, err := retrying(ctx, hd.h.o.timeout, func(ctx context.Context) (err error) {
		at = time.Now()
		st, err = hd.lk.Extend(ctx, hd.h.name, hd.token, ttl)
		return err
	})
	if over := hd.ended(); over != nil {
		return over
	}
	if err != nil {
		return unsure(uncertain, err)
	}
	if cause := hd.verdict(st); cause != nil {
		hd.end(cause)
		return cause
	}
	hd.mu.Lock()
	defer hd.mu.Unlock()
	if hd.over != nil {
		return hd.over
	}
	hd.asked = ttl
	hd.renewed(st, at)
	return nil
}

// verdict says why the hold is over, by a state in the backend; nil: it is not.
func (hd *Hold) verdict(st LockState) error {
	switch o := st.outcome(hd.fence); {
	case o == 0:
		return nil
	case o == LockClosed:
		return errClosedUnder
	case o == LockForced:
		return fmt.Errorf("%w: ended by force", ErrLockLost)
	case o == LockReleased:
		return ErrLockReleased
	case st.Fence > hd.fence:
		return fmt.Errorf("%w: generation %d came after this one, %d, had ended: %v", ErrLockLost, st.Fence, hd.fence, o)
	case o == LockExpired:
		return ErrLockExpired
	}
	return fmt.Errorf("%w: the backend does not know of it any more", ErrLockLost)
}

// keep extends the hold until it is over.
func (hd *Hold) keep() {
	defer close(hd.joined)
	var wait backoff
	for {
		hd.mu.Lock()
		every, asked := hd.ttl/3, hd.asked
		hd.mu.Unlock()
		if !hd.sleep(every) {
			return
		}
		for {
			err := hd.extend(hd.ctx, asked)
			if err == nil {
				wait = backoff{}
				break
			}
			if errors.Is(err, ErrNotHeld) || errors.Is(err, ErrBackendClosed) || !wait.sleep(hd.ctx) {
				return
			}
		}
	}
}

// sleep reports false when the hold ended first.
func (hd *Hold) sleep(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-hd.ctx.Done():
		return false
	}
}

// holding returns the handle's hold, if it has one that is not over.
func (h *handle) holding() *Hold {
	h.lockMu.Lock()
	hd := h.hold
	h.lockMu.Unlock()
	if hd == nil || hd.ended() != nil {
		return nil
	}
	return hd
}

// adopt makes hd the handle's hold, or says why it cannot be.
func (h *handle) adopt(hd *Hold) error {
	h.lockMu.Lock()
	defer h.lockMu.Unlock()
	switch {
	case h.detached.Load():
		return ErrDetached
	case h.closed.Load():
		return ErrChanClosed
	}
	if old := h.hold; old != nil {
		old.end(fmt.Errorf("%w: generation %d came after it", ErrLockLost, hd.fence))
	}
	h.hold = hd
	if hd.auto {
		hd.joined = make(chan struct{})
		go hd.keep()
	}
	return nil
}

var errClosedUnder = fmt.Errorf("%w: %w", ErrLockLost, ErrChanClosed)

// dropHold ends the hold of a handle that is not to hold any more.
func (h *handle) dropHold(cause error) {
	h.lockMu.Lock()
	defer h.lockMu.Unlock()
	if h.hold != nil {
		h.hold.end(cause)
	}
}

// unlock ends the handle's hold and releases its lock.
func (h *handle) unlock(ctx context.Context) error {
	if h.invalid != nil {
		return h.invalid
	}
	h.lockMu.Lock()
	hd := h.hold
	h.lockMu.Unlock()
	if hd == nil {
		return nil
	}
	hd.end(ErrLockReleased)
	if hd.joined != nil {
		<-hd.joined
	}
	hd.settle.Lock()
	defer hd.settle.Unlock()
	if hd.told {
		return nil
	}
	verdict, err := hd.release(ctx)
	if err != nil {
		return err
	}
	hd.told = true
	h.lockMu.Lock()
	if h.hold == hd {
		h.hold = nil
	}
	h.lockMu.Unlock()
	if errors.Is(verdict, ErrLockReleased) || errors.Is(verdict, ErrChanClosed) || h.closed.Load() {
		return nil
	}
	return verdict
}

// release releases the hold's lock in the backend: err says that this failed, verdict how
// the generation ended.
func (hd *Hold) release(ctx context.Context) (verdict, err error) {
	r := releaseDetached(hd.h, hd.lk, hd.token)
	select {
	case <-r.done:
	case <-ctx.Done():
		select {
		case <-r.done:
		default:
			return nil, fmt.Errorf("%w: %w", ErrUncertain, ctx.Err())
		}
	}
	if r.err != nil {
		return nil, r.err
	}
	return hd.verdict(r.state), nil
}

// closeLock ends the lock of a channel that has been closed. If that fails, the lock ends
// with its time.
func (h *handle) closeLock(ctx context.Context) {
	lk, ok := h.backend.(Locker)
	if !ok {
		return
	}
	_, _ = retrying(ctx, h.o.timeout, func(ctx context.Context) error {
		_, err := lk.EndLock(ctx, h.name, 0, LockClosed)
		return err
	})
}

// detachedRelease is a release that goes on whatever becomes of its caller.
type detachedRelease struct {
	done  chan struct{}
	state LockState
	err   error
}

func releaseDetached(h *handle, lk Locker, token ID) *detachedRelease {
	r := &detachedRelease{done: make(chan struct{})}
	go func() {
		defer close(r.done)
		_, r.err = retrying(context.Background(), h.o.timeout, func(ctx context.Context) (err error) {
			r.state, err = lk.Release(ctx, h.name, token)
			return err
		})
		if r.err == nil {
			handOver(h.backend, h.name)
		}
	}()
	return r
}
