package conformance

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/dchannel/dchannel"
)

// The lock cases need a backend that is a dchannel.Locker. Without one they are not
// covered, which is no failure even where that is strict: the interface is optional.
var locks = []guarantee{
	{
		name: "LockExclusive",
		rule: "at most one holds a channel's lock; who is refused is told which generation holds it, for how long, and what its holder says of itself",
		cases: []testCase{
			{"Race", lockRace},
			{"Told", lockTold},
		},
	},
	{
		name:  "LockExpires",
		rule:  "a lock that is not extended ends when its time is over by the server's clock: not before, and soon after",
		cases: []testCase{{"Time", lockExpires}},
	},
	{
		name: "LockExtends",
		rule: "extending moves the end of a lock that is held, and never begins one",
		cases: []testCase{
			{"Keeps", lockKept},
			{"NeverBegins", lockNotBegun},
		},
	},
	{
		name:  "LockReleaseWakes",
		rule:  "who waits for a lock, in whatever process, is woken by its release (one network hop, not a poll)",
		cases: []testCase{{"Waiters", lockWakes}},
	},
	{
		name:  "LockOutcome",
		rule:  "how a generation ended is told exactly, also to who asks late: released, expired, forced or closed",
		cases: []testCase{{"Each", lockOutcomes}},
	},
	{
		name:  "FenceIncreases",
		rule:  "every generation's fence is higher than all before it, also over a restart of the server and a loss of its state",
		alone: true,
		cases: []testCase{
			{"Sequence", fenceSequence},
			{"Restart", fenceOverRestart},
			{"StateLoss", fenceOverLoss},
		},
	},
	{
		name: "CloseLockedUntilExact",
		rule: "CloseLockedUntil returns nil when it released the lock, when that was done before or there was none, and when the channel is closed; " +
			"ErrLockExpired when the time was over; ErrLockLost when somebody else has had the lock or it was ended by force; ErrUnavailable when the backend is away",
		cases: []testCase{
			{"Returns", unlockReturns},
			{"Cut", unlockWhileCut},
		},
	},
	{
		name: "LockLossTold",
		rule: "a holder whose lock has ended is told by its next extension, and its context ends with the cause: at the latest when its own time is over",
		cases: []testCase{
			{"Forced", lossByForce},
			{"Cut", lossWhileCut},
		},
	},
	{
		name:  "NoGhostLock",
		rule:  "a LockFor whose reply is lost is repeated under its token or released: no lock stays behind that nobody holds",
		cases: []testCase{{"LostReply", lockReplyLost}},
	},
	{
		name:  "NoLostWakeup",
		rule:  "a release right after a failed try, or while the watch is being set up, is not missed",
		cases: []testCase{{"Rounds", noLostWakeup}},
	},
	{
		name: "LockCleanup",
		rule: "all that a lock leaves on the server expires by itself, and nothing watches when nobody waits",
		cases: []testCase{
			{"Watches", lockWatchesGone},
			{"Eternal", lockNotEternal},
		},
	},
}

// aWhile is the TTL of locks that are to expire: servers count in whole seconds, and some
// have a least of two.
const aWhile = 2 * time.Second

// lockers returns backends that have locks.
func (e *env) lockers(n int) []dchannel.Backend {
	bs := make([]dchannel.Backend, n)
	for i := range bs {
		bs[i] = e.backend()
		if _, ok := bs[i].(dchannel.Locker); !ok {
			e.lacks("the backend is no dchannel.Locker")
		}
	}
	return bs
}

// lock locks h's channel, which must succeed.
func (e *env) lock(h Handle, ttl time.Duration, opts ...dchannel.LockOption) *dchannel.Hold {
	ctx, done := e.patient()
	defer done()
	hold, err := h.LockFor(ctx, ttl, opts...)
	if err != nil {
		e.fatalf("LockFor: %v", err)
	}
	return hold
}

func (e *env) unlock(h Handle) {
	if err := h.CloseLockedUntil(); err != nil {
		e.fatalf("CloseLockedUntil of a lock that is held: %v", err)
	}
}

// lockedOut expects that h's channel is locked.
func (e *env) lockedOut(h Handle) *dchannel.LockedError {
	ctx, done := e.patient()
	defer done()
	_, err := h.LockFor(ctx, time.Minute)
	var locked *dchannel.LockedError
	if !errors.As(err, &locked) || !errors.Is(err, dchannel.ErrLocked) {
		e.fatalf("LockFor of a locked channel: %v, want a LockedError", err)
	}
	return locked
}

// outcome expects how a generation ended.
func (e *env) outcome(h Handle, fence uint64, want dchannel.LockOutcome) {
	ctx, done := context.WithTimeout(e.ctx, e.h.Patience+aWhile)
	defer done()
	if got, err := h.WaitFence(ctx, fence); err != nil {
		e.fatalf("WaitFence(%d): %s", fence, e.why(err))
	} else if got != want {
		e.fatalf("the generation %d was %v, want %v", fence, got, want)
	}
}

// free waits until h's channel is not locked.
func (e *env) free(h Handle) {
	e.eventually(func() bool {
		left, err := h.LockedUntil(e.ctx)
		if err != nil {
			e.fatalf("LockedUntil: %v", err)
		}
		return left == 0
	}, "%q is not locked any more", h.Name())
}

func lockRace(e *env) {
	bs := e.lockers(3)
	for round := range 10 {
		name := e.name(fmt.Sprint("race", round))
		var inside, won atomic.Int64
		var fences [12]uint64
		var race []func()
		for i := range fences {
			h := e.handle(bs[i%len(bs)], name)
			race = append(race, func() {
				hold, err := h.LockFor(e.ctx, time.Minute)
				if errors.Is(err, dchannel.ErrLocked) {
					return
				} else if err != nil {
					e.fatalf("LockFor: %v", err)
				}
				if n := inside.Add(1); n != 1 {
					e.fatalf("%d hold the lock at once", n)
				}
				won.Add(1)
				fences[i] = hold.Fence()
				e.sleep(settle)
				inside.Add(-1)
				e.unlock(h)
			})
		}
		e.all(race...)
		if won.Load() == 0 {
			e.fatalf("%d asked for a lock that was free, and nobody got it", len(fences))
		}
		seen := map[uint64]bool{}
		for _, f := range fences {
			if f != 0 && seen[f] {
				e.fatalf("two holds have the fence %d", f)
			}
			seen[f] = true
		}
	}
}

func lockTold(e *env) {
	bs := e.lockers(2)
	name := e.name("told")
	a, b := e.handle(bs[0], name), e.handle(bs[1], name)
	if left, err := b.LockedUntil(e.ctx); err != nil || left != 0 {
		e.fatalf("LockedUntil of a channel that is not locked: %v, %v", left, err)
	}
	const info = "Lösch-Lauf 7 "
	hold := e.lock(a, time.Minute, dchannel.WithLockInfo(info))
	if hold.TTL() < time.Minute || hold.Remaining() <= 50*time.Second || hold.Remaining() >= hold.TTL() {
		e.fatalf("a hold for a minute has a TTL of %v and %v left", hold.TTL(), hold.Remaining())
	}
	for _, h := range []Handle{a, b} {
		locked := e.lockedOut(h)
		if locked.Fence != hold.Fence() || locked.Info != info || locked.Remaining <= 50*time.Second || locked.Remaining > hold.TTL() {
			e.fatalf("who is refused is told %+v, want fence %d, info %q and about a minute", *locked, hold.Fence(), info)
		}
		if left, err := h.LockedUntil(e.ctx); err != nil || left <= 50*time.Second || left > hold.TTL() {
			e.fatalf("LockedUntil of a channel that is locked for a minute: %v, %v", left, err)
		}
	}
	e.unlock(a)
	if left, err := b.LockedUntil(e.ctx); err != nil || left != 0 {
		e.fatalf("LockedUntil after the release: %v, %v", left, err)
	}
	e.lock(b, time.Minute)
	e.unlock(b)
}

func lockExpires(e *env) {
	bs := e.lockers(2)
	name := e.name("expires")
	a, b := e.handle(bs[0], name), e.handle(bs[1], name)
	before := time.Now()
	hold := e.lock(a, aWhile)
	after := time.Now()
	e.outcome(b, hold.Fence(), dchannel.LockExpired)
	ended := time.Now()
	if lived := ended.Sub(before); lived < hold.TTL()-20*time.Millisecond {
		e.fatalf("a lock for %v was over %v after it was asked for", hold.TTL(), lived)
	}
	if late := ended.Sub(after) - hold.TTL(); late > time.Second+e.h.Patience/4 {
		e.fatalf("a lock for %v was over %v late", hold.TTL(), late)
	}
	e.lock(b, time.Minute)
}

func lockKept(e *env) {
	bs := e.lockers(2)
	name := e.name("kept")
	a, b := e.handle(bs[0], name), e.handle(bs[1], name)
	hold := e.lock(a, aWhile)
	end := time.Now().Add(hold.TTL() + time.Second)
	for time.Now().Before(end) {
		if _, err := hold.Extend(e.ctx, aWhile); err != nil {
			e.fatalf("Extend of a lock that is held: %v", err)
		}
		e.sleep(aWhile / 5)
	}
	if locked := e.lockedOut(b); locked.Fence != hold.Fence() {
		e.fatalf("extending made generation %d of %d", locked.Fence, hold.Fence())
	}
	if _, err := hold.Extend(e.ctx, time.Minute); err != nil {
		e.fatalf("Extend of a lock that is held: %v", err)
	}
	if left, err := b.LockedUntil(e.ctx); err != nil || left < 50*time.Second {
		e.fatalf("LockedUntil after an extension to a minute: %v, %v", left, err)
	}
	e.unlock(a)
}

// lockNotBegun asks the backend itself: the core does not extend what it knows to be over.
func lockNotBegun(e *env) {
	bs := e.lockers(2)
	lk, name, token := bs[0].(dchannel.Locker), e.name("not-begun"), dchannel.NewID()
	h := e.handle(bs[1], name)
	extend := func(when string, mine bool) {
		ctx, done := e.patient()
		defer done()
		st, err := lk.Extend(ctx, name, token, time.Minute)
		if err != nil || st.Held && st.Mine || st.Mine != mine {
			e.fatalf("Extend %s: %+v, %v", when, st, err)
		}
	}
	extend("of what never was", false)
	if left, err := h.LockedUntil(e.ctx); err != nil || left != 0 {
		e.fatalf("extending what never was locks the channel for %v (%v)", left, err)
	}
	ctx, done := e.patient()
	defer done()
	if st, err := lk.Acquire(ctx, name, dchannel.Lease{Token: token, TTL: time.Minute}); err != nil || !st.Held || !st.Mine {
		e.fatalf("Acquire: %+v, %v", st, err)
	}
	if st, err := lk.Release(ctx, name, token); err != nil || st.Held {
		e.fatalf("Release: %+v, %v", st, err)
	}
	extend("after the release", true)
	if left, err := h.LockedUntil(e.ctx); err != nil || left != 0 {
		e.fatalf("extending a lock that was released locks the channel for %v (%v)", left, err)
	}
	if st, err := lk.Acquire(ctx, name, dchannel.Lease{Token: token, TTL: time.Minute}); err != nil || st.Held || !st.Mine {
		e.fatalf("Acquire under a token whose generation is over: %+v, %v", st, err)
	}
	hold := e.lock(h, time.Minute)
	extend("of what is another's by now", false)
	if locked := e.lockedOut(h); locked.Fence != hold.Fence() {
		e.fatalf("extending under an old token made generation %d of %d", locked.Fence, hold.Fence())
	}
}

func lockWakes(e *env) {
	bs := e.lockers(2)
	const wake = 2 * promptly // two hops, and the jitter of those who contend
	best := time.Duration(1<<63 - 1)
	for i := 0; i < 8 && best > wake; i++ {
		name := e.name(fmt.Sprint("wakes", i))
		a := e.handle(bs[0], name)
		hold := e.lock(a, time.Minute)
		woken := make(chan time.Time, 4)
		for j, b := range []dchannel.Backend{bs[0], bs[1], bs[1]} {
			h := e.handle(b, name)
			e.start(func() {
				if j < 2 {
					e.outcome(h, hold.Fence(), dchannel.LockReleased)
				} else {
					e.lock(h, time.Minute, dchannel.WithWait())
				}
				woken <- time.Now()
			})
		}
		e.sleep(200 * time.Millisecond) // so that they do wait
		released := time.Now()
		e.unlock(a)
		var last time.Duration
		for range 3 {
			select {
			case at := <-woken:
				last = max(last, at.Sub(released))
			case <-e.ctx.Done():
				e.check()
				return
			}
		}
		best = min(best, last)
	}
	if best > wake {
		e.fatalf("who waits was woken %v after the release, at best; want at most %v", best.Round(time.Millisecond), wake)
	}
}

func lockOutcomes(e *env) {
	bs := e.lockers(3)
	for _, c := range []struct {
		want dchannel.LockOutcome
		end  func(holder, other Handle, fence uint64)
	}{
		{dchannel.LockReleased, func(a, _ Handle, _ uint64) { e.unlock(a) }},
		{dchannel.LockExpired, func(_, _ Handle, _ uint64) {}},
		{dchannel.LockForced, func(_, b Handle, fence uint64) {
			if err := b.ForceUnlock(e.ctx, fence); err != nil {
				e.fatalf("ForceUnlock: %v", err)
			}
		}},
		{dchannel.LockClosed, func(_, b Handle, _ uint64) {
			if err := b.Close(); err != nil {
				e.fatalf("Close: %v", err)
			}
		}},
	} {
		name := e.name(fmt.Sprint("outcome-", c.want))
		a, b, late := e.handle(bs[0], name), e.handle(bs[1], name), e.handle(bs[2], name)
		ttl := time.Minute
		if c.want == dchannel.LockExpired {
			ttl = aWhile
		}
		hold := e.lock(a, ttl)
		var waiting []func()
		for _, x := range bs {
			h := e.handle(x, name)
			waiting = append(waiting, func() { e.outcome(h, hold.Fence(), c.want) })
		}
		waiting = append(waiting, func() {
			e.sleep(200 * time.Millisecond) // so that they do wait
			c.end(a, b, hold.Fence())
		})
		e.all(waiting...)
		e.outcome(late, hold.Fence(), c.want)
		if got, err := late.WaitUnlocked(e.ctx); err != nil || got != dchannel.LockNone {
			e.fatalf("WaitUnlocked of a channel that is not locked: %v, %v", got, err)
		}
		if c.want == dchannel.LockClosed {
			_, err := late.LockFor(e.ctx, time.Minute)
			e.expectErr("LockFor of a closed channel", err, dchannel.ErrChanClosed)
			continue
		}
		next := e.lock(late, time.Minute)
		e.outcome(b, hold.Fence(), c.want) // while the next one is held
		e.unlock(late)
		e.outcome(b, hold.Fence(), c.want) // the last but one
		e.outcome(b, next.Fence(), dchannel.LockReleased)
		if err := b.ForceUnlock(e.ctx, next.Fence()); !errors.Is(err, dchannel.ErrNotHeld) {
			e.fatalf("ForceUnlock of what was released: %v, want ErrNotHeld", err)
		}
	}
}
