package dchannel

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"
	"unicode/utf8"
)

// Those who wait in several processes for one lock are spread over this time when it is
// free, so that most of them see that somebody was faster and do not try. It doubles
// with each try in vain.
const (
	spreadMin = 2 * time.Millisecond
	spreadMax = 64 * time.Millisecond
)

// contender is one LockFor.
type contender struct {
	h     *handle
	lk    Locker
	lease Lease
	o     lockOptions
}

func (h *handle) lockFor(ctx context.Context, ttl time.Duration, opts []LockOption) (*Hold, error) {
	lk, err := h.lockable()
	if err != nil {
		return nil, err
	}
	c := &contender{h: h, lk: lk}
	for _, opt := range opts {
		if opt == nil {
			return nil, fmt.Errorf("%w: a lock option is nil", ErrInvalidOption)
		}
		opt(&c.o)
	}
	if err := checkTTL("LockFor", ttl); err != nil {
		return nil, err
	}
	if n := len(c.o.info); n > MaxLockInfo || !utf8.ValidString(c.o.info) {
		return nil, fmt.Errorf("%w: WithLockInfo: %d bytes, want at most %d bytes of UTF-8", ErrInvalidOption, n, MaxLockInfo)
	}
	if h.closed.Load() {
		return nil, ErrChanClosed
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	c.lease = Lease{Token: NewID(), TTL: ttl, Info: c.o.info}
	var hd *Hold
	switch {
	case !c.o.wait:
		hd, err = c.try(ctx, h.o.timeout)
	case c.o.fair:
		hd, err = c.waitInLine(ctx)
	default:
		hd, err = c.wait(ctx)
	}
	if errors.Is(err, ErrChanClosed) {
		h.sawClose()
	}
	return hd, err
}

// ask calls Acquire, for as long as limit says (0: as ctx). On an error nothing is left
// on the server, or it is ErrUncertain.
func (c *contender) ask(ctx context.Context, limit time.Duration) (st LockState, at time.Time, err error) {
	uncertain, err := retrying(ctx, limit, func(ctx context.Context) (err error) {
		at = time.Now()
		st, err = c.lk.Acquire(ctx, c.h.name, c.lease)
		return err
	})
	if err != nil && uncertain {
		err = c.leave(err)
	}
	return st, at, err
}

// leave releases what the contender may have on the server, because of err.
func (c *contender) leave(err error) error {
	r := releaseDetached(c.h, c.lk, c.lease.Token)
	// The caller is to return within 100 ms of its context's end.
	t := time.NewTimer(50 * time.Millisecond)
	defer t.Stop()
	select {
	case <-r.done:
		if r.err == nil {
			return err
		}
	case <-t.C:
	}
	return unsure(true, err)
}

// try asks once.
func (c *contender) try(ctx context.Context, limit time.Duration) (*Hold, error) {
	for i := 0; ; i++ {
		st, at, err := c.ask(ctx, limit)
		switch {
		case err != nil:
			return nil, err
		case st.Held && st.Mine:
			return c.hold(st, at)
		case st.Mine && i < 3: // a retry, and what the first attempt had begun is over already
			c.lease.Token = NewID()
			continue
		}
		return nil, &LockedError{Channel: c.h.name, Fence: st.Fence, Remaining: st.Remaining, Info: st.Info}
	}
}

// hold makes the hold of a generation that is the contender's.
func (c *contender) hold(st LockState, at time.Time) (*Hold, error) {
	hd := newHold(c.h, c.lk, c.lease, c.o.auto, st, at)
	if err := c.h.adopt(hd); err != nil {
		hd.end(err)
		return nil, c.leave(err)
	}
	return hd, nil
}

// shared returns the channel's shared part, for a wait.
func (h *handle) shared() *local { return acquire(h.backend, h.name) }

// stopped says why a wait cannot go on.
func (h *handle) stopped() error {
	switch {
	case h.detached.Load():
		return ErrDetached
	case h.closed.Load():
		return ErrChanClosed
	}
	return nil
}

// bound returns a context that ends with ctx, and when the handle is detached.
func (h *handle) bound(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	h.endMu.Lock()
	defer h.endMu.Unlock()
	if h.detached.Load() {
		cancel()
		return ctx, cancel
	}
	if h.left == nil {
		h.left = make(chan struct{})
	}
	left := h.left
	go func() {
		select {
		case <-left:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

// wait waits in this process's line, and, as its first, for the lock.
func (c *contender) wait(outer context.Context) (hd *Hold, err error) {
	l := c.h.shared()
	defer l.release()
	ctx, cancel := c.h.bound(outer)
	defer cancel()
	defer func() {
		if over := c.h.stopped(); err != nil && outer.Err() == nil && over != nil {
			err = over
		}
	}()
	t := l.lineUp()
	defer func() { l.stepOut(t, err == nil) }()

	var w *lockWatch
	defer func() {
		if w != nil {
			l.leaveLock(w)
		}
	}()
	select {
	case <-t.first: // nobody waits: see whether the lock is free
		if hd, err = c.try(ctx, 0); !errors.Is(err, ErrLocked) {
			return hd, err
		}
		w = l.joinLock(c.lk)
	default:
		w = l.joinLock(c.lk) // keeps it alive from one first to the next
		select {
		case <-t.first:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	spread := spreadMin
	for n := w.fresh(); ; {
		v, err := w.next(ctx, n, t.now, 0)
		switch {
		case errors.Is(err, errWoken): // released here: go
		case err != nil:
			return nil, err
		case v.state.Held:
			n = v.read + 1
			continue
		default:
			if free, err := c.linger(ctx, w, t, spread); err != nil {
				return nil, err
			} else if !free {
				n = w.latest().read + 1
				continue
			}
		}
		if hd, err = c.try(ctx, 0); !errors.Is(err, ErrLocked) {
			return hd, err
		}
		l.lostRace()
		n = w.fresh()
		spread = min(2*spread, spreadMax)
	}
}

// linger waits a little, for a lock that is free, and tells whether it still is.
func (c *contender) linger(ctx context.Context, w *lockWatch, t *turn, spread time.Duration) (bool, error) {
	timer := time.NewTimer(rand.N(spread)) //nolint:gosec // jitter
	defer timer.Stop()
	select {
	case <-timer.C:
		return !w.latest().state.Held, nil
	case <-t.now:
		return true, nil
	case <-ctx.Done():
		return false, ctx.Err()
	}
}

// waitInLine waits in the backend's line.
func (c *contender) waitInLine(outer context.Context) (hd *Hold, err error) {
	c.lease.Fair = true
	l := c.h.shared()
	defer l.release()
	ctx, cancel := c.h.bound(outer)
	defer cancel()
	defer func() {
		if err == nil {
			return
		}
		if over := c.h.stopped(); outer.Err() == nil && over != nil {
			err = over
		}
		if !errors.Is(err, errors.ErrUnsupported) && !errors.Is(err, ErrUncertain) {
			err = c.leave(err)
		}
	}()
	st, at, err := c.ask(ctx, 0)
	if err != nil || st.Held && st.Mine {
		return c.won(st, at, err)
	}
	w := l.joinLock(c.lk)
	defer l.leaveLock(w)
	for n := w.fresh(); ; {
		// A place is kept by asking again in time.
		v, err := w.next(ctx, n, nil, max(c.lease.TTL/3-time.Since(at), time.Millisecond))
		switch {
		case err != nil && !errors.Is(err, errWoken):
			return nil, err
		case err == nil && v.state.Held && v.state.Token == c.lease.Token:
			return c.hold(v.state, v.at)
		case err == nil && v.state.Held && (v.state.Token != ID{} || v.state.Fence == st.Fence):
			n = v.read + 1
			continue
		}
		n = w.fresh()
		st, at, err = c.ask(ctx, 0)
		switch {
		case err != nil || st.Held && st.Mine:
			return c.won(st, at, err)
		case st.Mine: // its turn came and went
			c.lease.Token = NewID()
			at = time.Time{}
		}
	}
}

func (c *contender) won(st LockState, at time.Time, err error) (*Hold, error) {
	if err != nil {
		return nil, err
	}
	return c.hold(st, at)
}

func (h *handle) waitFence(outer context.Context, fence uint64) (o LockOutcome, err error) {
	lk, err := h.lockable()
	if err != nil {
		return 0, err
	}
	if err := outer.Err(); err != nil {
		return 0, err
	}
	l := h.shared()
	defer l.release()
	ctx, cancel := h.bound(outer)
	defer cancel()
	w := l.joinLock(lk)
	defer l.leaveLock(w)
	for n := w.fresh(); ; {
		v, err := w.next(ctx, n, nil, 0)
		if err != nil {
			if outer.Err() == nil && h.detached.Load() {
				err = ErrDetached
			}
			return 0, err
		}
		n = v.read + 1
		if fence == 0 {
			if !v.state.Held {
				return LockNone, nil
			}
			fence = v.state.Fence
		}
		if o := v.state.outcome(fence); o != 0 {
			return o, nil
		}
	}
}
