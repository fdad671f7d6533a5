package conformance

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/dchannel/dchannel"
)

// fences locks and unlocks n times, by turns, and checks that each fence is above all
// before.
func (e *env) fences(last uint64, n int, hs ...Handle) uint64 {
	for i := range n {
		h := hs[i%len(hs)]
		f := e.lock(h, time.Minute).Fence()
		if f <= last {
			e.fatalf("the fence %d came after %d", f, last)
		}
		last = f
		e.unlock(h)
	}
	return last
}

func fenceSequence(e *env) {
	bs := e.lockers(2)
	name := e.name("fences")
	e.fences(0, 40, e.handle(bs[0], name), e.handle(bs[1], name))
}

func fenceOverRestart(e *env) {
	e.need(e.h.Restart != nil, "Restart")
	bs := e.lockers(2)
	name := e.name("fences")
	opt := dchannel.WithTimeout(e.h.Patience)
	a, b := e.handle(bs[0], name, opt), e.handle(bs[1], name, opt)
	last := e.fences(0, 3, a, b)
	for _, kill := range []bool{false, true} {
		start := e.once(e.h.Restart(e.tb, kill))
		start()
		last = e.fences(last, 3, a, b)
	}
}

func fenceOverLoss(e *env) {
	e.need(e.h.LoseState != nil, "LoseState")
	bs := e.lockers(2)
	name := e.name("fences")
	opt := dchannel.WithTimeout(e.h.Patience)
	a, b := e.handle(bs[0], name, opt), e.handle(bs[1], name, opt)
	last := e.fences(0, 20, a, b)
	for range 2 {
		e.h.LoseState(e.tb)
		last = e.fences(last, 3, a, b)
	}
}

func unlockReturns(e *env) {
	bs := e.lockers(2)
	pair := func(what string) (a, b Handle) {
		name := e.name(what)
		return e.handle(bs[0], name), e.handle(bs[1], name)
	}
	expect := func(what string, h Handle, want error) {
		err := h.CloseLockedUntil()
		if want == nil && err != nil || want != nil && !errors.Is(err, want) {
			e.fatalf("CloseLockedUntil %s: %v, want %v", what, err, want)
		}
		if err := h.CloseLockedUntil(); err != nil {
			e.fatalf("CloseLockedUntil %s, again: %v", what, err)
		}
	}
	force := func(h Handle, fence uint64) {
		if err := h.ForceUnlock(e.ctx, fence); err != nil {
			e.fatalf("ForceUnlock: %v", err)
		}
	}
	a, b := pair("released")
	expect("of what never was locked", a, nil)
	hold := e.lock(a, time.Minute, dchannel.WithAutoExtend())
	expect("by who does not hold the lock", b, nil)
	e.lockedOut(b)
	expect("of what is held", a, nil)
	if !errors.Is(context.Cause(hold.Context()), dchannel.ErrLockReleased) {
		e.fatalf("a hold's context ends after CloseLockedUntil with %v", context.Cause(hold.Context()))
	}
	e.lock(b, time.Minute)
	expect("when another holds the lock by now", a, nil)
	e.lockedOut(a)
	expect("of what is held", b, nil)

	a, b = pair("forced")
	force(b, e.lock(a, time.Minute).Fence())
	expect("after a forced end", a, dchannel.ErrLockLost)

	a, b = pair("another")
	force(b, e.lock(a, time.Minute).Fence())
	e.lock(b, time.Minute)
	expect("when another has had the lock", a, dchannel.ErrLockLost)
	e.lockedOut(a)

	a, b = pair("closed")
	e.lock(a, time.Minute)
	if err := b.Close(); err != nil {
		e.fatalf("Close: %v", err)
	}
	expect("of a closed channel", a, nil)

	a, b = pair("expired")
	hold = e.lock(a, aWhile)
	e.outcome(b, hold.Fence(), dchannel.LockExpired)
	expect("when the time is over", a, dchannel.ErrLockExpired)
}

func unlockWhileCut(e *env) {
	e.need(e.h.Cut != nil, "Cut")
	bs := e.lockers(2)
	name := e.name("cut")
	a, b := e.handle(bs[0], name, dchannel.WithTimeout(300*time.Millisecond)), e.handle(bs[1], name)
	hold := e.lock(a, time.Minute, dchannel.WithAutoExtend())
	heal := e.once(e.h.Cut(e.tb, bs[0]))
	e.expectErr("CloseLockedUntil without a backend", a.CloseLockedUntil(), dchannel.ErrUnavailable)
	if hold.Context().Err() == nil || hold.Remaining() != 0 {
		e.fatalf("the hold goes on after CloseLockedUntil, for %v", hold.Remaining())
	}
	heal()
	e.eventually(func() bool { return a.CloseLockedUntil() == nil }, "CloseLockedUntil releases the lock when the backend is back")
	e.lock(b, time.Minute)
}

func lossByForce(e *env) {
	bs := e.lockers(2)
	name := e.name("forced")
	a, b := e.handle(bs[0], name), e.handle(bs[1], name)
	hold := e.lock(a, time.Minute)
	if err := b.ForceUnlock(e.ctx, 0); err != nil {
		e.fatalf("ForceUnlock: %v", err)
	}
	_, err := hold.Extend(e.ctx, time.Minute)
	e.expectErr("Extend after a forced end", err, dchannel.ErrLockLost)
	if hold.Remaining() != 0 || !errors.Is(context.Cause(hold.Context()), dchannel.ErrLockLost) {
		e.fatalf("after the loss was told %v are left, and the context ends with %v", hold.Remaining(), context.Cause(hold.Context()))
	}

	name = e.name("forced-later")
	a, b = e.handle(bs[0], name), e.handle(bs[1], name)
	hold = e.lock(b, aWhile, dchannel.WithAutoExtend())
	if err := a.ForceUnlock(e.ctx, hold.Fence()); err != nil {
		e.fatalf("ForceUnlock: %v", err)
	}
	e.ends(hold, dchannel.ErrLockLost, hold.TTL())
}

// ends expects that the hold's context ends with the cause, in time.
func (e *env) ends(hold *dchannel.Hold, cause error, within time.Duration) {
	began := time.Now()
	ctx, done := e.patient()
	defer done()
	select {
	case <-hold.Context().Done():
	case <-ctx.Done():
		e.fatalf("the hold's context does not end")
	}
	if took := time.Since(began); took > within+e.h.Patience/4 {
		e.fatalf("the hold's context ended after %v, want at most %v", took, within)
	}
	if got := context.Cause(hold.Context()); !errors.Is(got, cause) || !errors.Is(got, dchannel.ErrNotHeld) {
		e.fatalf("the hold's context ended with %v, want %v", got, cause)
	}
}

func lossWhileCut(e *env) {
	e.need(e.h.Cut != nil, "Cut")
	bs := e.lockers(1)
	h := e.handle(bs[0], e.name("cut"))
	hold := e.lock(h, aWhile, dchannel.WithAutoExtend())
	ttl := hold.TTL()
	e.sleep(ttl / 2)
	e.once(e.h.Cut(e.tb, bs[0]))
	e.ends(hold, dchannel.ErrLockExpired, ttl)
}

// lossy loses the replies of a backend's Acquire.
type lossy struct {
	dchannel.Backend
	dchannel.Locker
	lose atomic.Int64
}

var errNoReply = fmt.Errorf("%w: the reply was lost", dchannel.ErrUncertain)

func (l *lossy) Acquire(ctx context.Context, channel string, lease dchannel.Lease) (dchannel.LockState, error) {
	st, err := l.Locker.Acquire(ctx, channel, lease)
	if err == nil && l.lose.Add(-1) >= 0 {
		return dchannel.LockState{}, errNoReply
	}
	return st, err
}

func lockReplyLost(e *env) {
	bs := e.lockers(2)
	name := e.name("lost-reply")
	l := &lossy{Backend: bs[0], Locker: bs[0].(dchannel.Locker)}
	a, b := e.wrapped(dchannel.New(name, l), bs[0]), e.handle(bs[1], name)

	l.lose.Store(2)
	hold := e.lock(a, time.Minute)
	if locked := e.lockedOut(b); locked.Fence != hold.Fence() {
		e.fatalf("a LockFor that was repeated has the fence %d, the server %d", hold.Fence(), locked.Fence)
	}
	e.unlock(a)
	e.free(b)

	l.lose.Store(1 << 40)
	ctx, done := context.WithTimeout(e.ctx, 100*time.Millisecond)
	defer done()
	_, err := a.LockFor(ctx, 5*time.Minute)
	e.expectErr("LockFor without any reply", err, context.DeadlineExceeded)
	began := time.Now()
	e.free(b)
	e.logf("free %v after the call", time.Since(began).Round(time.Millisecond))
	e.lock(b, time.Minute)
}

func noLostWakeup(e *env) {
	bs := e.lockers(2)
	const lanes, rounds = 4, 25
	var all []func()
	for lane := range lanes {
		name := e.name(fmt.Sprint("wakeup", lane))
		a, b := e.handle(bs[0], name), e.handle(bs[1], name)
		all = append(all, func() {
			for i := range rounds {
				e.lock(a, 10*time.Minute)
				locked := e.lockedOut(b)
				e.all(func() {
					e.sleep(rand.N(5 * time.Millisecond))
					e.unlock(a)
				}, func() {
					if i%2 == 0 {
						e.outcome(b, locked.Fence, dchannel.LockReleased)
					} else {
						e.lock(b, 10*time.Minute, dchannel.WithWait())
						e.unlock(b)
					}
				})
			}
		})
	}
	e.all(all...)
}

func lockWatchesGone(e *env) {
	e.need(e.h.Upstreams != nil, "Upstreams")
	bs := e.lockers(2)
	name := e.name("watches")
	a := e.handle(bs[0], name)
	hold := e.lock(a, time.Minute)
	var waiting []func()
	for i := range 6 {
		h := e.handle(bs[i%2], name)
		waiting = append(waiting, func() {
			switch i / 2 {
			case 0:
				e.outcome(h, hold.Fence(), dchannel.LockReleased)
			case 1:
				e.lock(h, time.Minute, dchannel.WithWait())
				e.unlock(h)
			case 2: // gives up
				ctx, done := context.WithTimeout(e.ctx, settle)
				defer done()
				_, err := h.LockFor(ctx, time.Minute, dchannel.WithWait())
				e.expectErr("LockFor that gave up", err, context.DeadlineExceeded)
			}
		})
	}
	e.all(append(waiting, func() {
		e.sleep(100 * time.Millisecond)
		e.unlock(a)
	})...)
	e.eventually(func() bool { return e.h.Upstreams(e.tb, name) == 0 }, "nothing watches %q any more", name)
}

func lockNotEternal(e *env) {
	e.need(e.h.Eternal != nil, "Eternal")
	bs := e.lockers(2)
	held, released, forced := e.handle(bs[0], e.name("held")), e.handle(bs[0], e.name("released")), e.handle(bs[0], e.name("forced"))
	e.lock(held, time.Minute)
	for range 3 {
		e.lock(released, time.Minute)
		e.unlock(released)
	}
	hold := e.lock(forced, time.Minute)
	if err := e.handle(bs[1], forced.Name()).ForceUnlock(e.ctx, hold.Fence()); err != nil {
		e.fatalf("ForceUnlock: %v", err)
	}
	if left := e.h.Eternal(e.tb); len(left) > 0 {
		e.fatalf("what a lock leaves would stay for ever: %q", left)
	}
}
