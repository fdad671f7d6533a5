package conformance

import (
	"context"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/dchannel/dchannel"
)

var lockMutants = []mutant{
	{"LockExclusive", "two that ask at the same moment both get it", breaking(func(_ *lab, b *broken) {
		b.acquire = func(ctx context.Context, channel string, l dchannel.Lease) (dchannel.LockState, error) {
			before, err := b.locker().LockState(ctx, channel)
			if err != nil {
				return before, err
			}
			time.Sleep(3 * time.Millisecond) //nolint:forbidigo // the gap is the bug
			st, err := b.locker().Acquire(ctx, channel, l)
			if err != nil || before.Held {
				return st, err
			}
			if st.Held && !st.Mine { // it was free when we looked
				return dchannel.LockState{Fence: st.Fence, Held: true, Mine: true, TTL: l.TTL, Remaining: l.TTL}, nil
			}
			return st, nil
		}
	})},
	{"LockExclusive", "who is refused is not told what the holder says", breaking(func(_ *lab, b *broken) {
		b.acquire = func(ctx context.Context, channel string, l dchannel.Lease) (dchannel.LockState, error) {
			l.Info = ""
			return b.locker().Acquire(ctx, channel, l)
		}
	})},
	{"LockExpires", "a lock ends when three quarters of its time are over", breaking(func(_ *lab, b *broken) {
		b.acquire = func(ctx context.Context, channel string, l dchannel.Lease) (dchannel.LockState, error) {
			asked := l.TTL
			if asked > time.Second*10 {
				return b.locker().Acquire(ctx, channel, l)
			}
			l.TTL = l.TTL * 3 / 4
			st, err := b.locker().Acquire(ctx, channel, l)
			st.TTL = asked
			st.Remaining = st.Remaining * 4 / 3
			return st, err
		}
	})},
	{"LockExtends", "extending a lock that has ended begins a new one", breaking(func(_ *lab, b *broken) {
		b.extend = func(ctx context.Context, channel string, token dchannel.ID, ttl time.Duration) (dchannel.LockState, error) {
			st, err := b.locker().Extend(ctx, channel, token, ttl)
			if err == nil && !st.Held {
				_, err = b.locker().Acquire(ctx, channel, dchannel.Lease{Token: dchannel.NewID(), TTL: ttl})
			}
			return st, err
		}
	})},
	{"LockExtends", "extending a lock does nothing", breaking(func(_ *lab, b *broken) {
		b.extend = func(ctx context.Context, channel string, token dchannel.ID, ttl time.Duration) (dchannel.LockState, error) {
			st, err := b.locker().LockState(ctx, channel)
			if err != nil || !st.Held || st.Token != token {
				return b.locker().Extend(ctx, channel, token, ttl)
			}
			st.Mine, st.TTL, st.Remaining = true, ttl, ttl
			return st, nil
		}
	})},
	{"LockReleaseWakes", "hints come 400 ms late", breaking(func(_ *lab, b *broken) {
		b.watchLock = func(ctx context.Context, channel string, hint func()) (dchannel.Subscription, error) {
			return b.locker().WatchLock(ctx, channel, func() { time.AfterFunc(400*time.Millisecond, hint) })
		}
	})},
	{"LockOutcome", "a forced end looks like a release to those who ask", breaking(func(_ *lab, b *broken) {
		b.lockState = func(ctx context.Context, channel string) (dchannel.LockState, error) {
			st, err := b.locker().LockState(ctx, channel)
			return retold(st, dchannel.LockForced, dchannel.LockReleased), err
		}
	})},
	{"LockOutcome", "only the last end is remembered", breaking(func(_ *lab, b *broken) {
		b.lockState = func(ctx context.Context, channel string) (dchannel.LockState, error) {
			st, err := b.locker().LockState(ctx, channel)
			st.Ended = st.Ended[:min(len(st.Ended), 1)]
			return st, err
		}
	})},
	{"FenceIncreases", "fences begin anew when the server has lost its state", func() Harness {
		var mu sync.Mutex
		var lost uint64
		h, _ := harnessWith(func(_ *lab, b *broken) {
			shift := func() uint64 {
				mu.Lock()
				defer mu.Unlock()
				return lost << 40
			}
			b.fences = func(st dchannel.LockState) dchannel.LockState {
				if st.Fence != 0 {
					st.Fence -= shift()
				}
				st.Ended = slices.Clone(st.Ended)
				for i := range st.Ended {
					st.Ended[i].Fence -= shift()
				}
				return st
			}
			b.endLock = func(ctx context.Context, channel string, fence uint64, o dchannel.LockOutcome) (dchannel.LockState, error) {
				if fence != 0 {
					fence += shift()
				}
				return b.locker().EndLock(ctx, channel, fence, o)
			}
		})
		lose := h.LoseState
		h.LoseState = func(t testing.TB) {
			lose(t)
			mu.Lock()
			defer mu.Unlock()
			lost++
		}
		return h
	}},
	{"CloseLockedUntilExact", "releasing a lock whose time is over says that it was released", breaking(func(_ *lab, b *broken) {
		b.release = func(ctx context.Context, channel string, token dchannel.ID) (dchannel.LockState, error) {
			st, err := b.locker().Release(ctx, channel, token)
			return retold(st, dchannel.LockExpired, dchannel.LockReleased), err
		}
	})},
	{"CloseLockedUntilExact", "releasing does not look at the token", breaking(func(_ *lab, b *broken) {
		b.release = func(ctx context.Context, channel string, token dchannel.ID) (dchannel.LockState, error) {
			st, err := b.locker().Release(ctx, channel, token)
			if err == nil && st.Held && !st.Mine {
				_, err = b.locker().EndLock(ctx, channel, st.Fence, dchannel.LockReleased)
			}
			return st, err
		}
	})},
	{"LockLossTold", "a lock that was ended by force is extended all the same", breaking(func(_ *lab, b *broken) {
		b.extend = func(ctx context.Context, channel string, token dchannel.ID, ttl time.Duration) (dchannel.LockState, error) {
			st, err := b.locker().Extend(ctx, channel, token, ttl)
			if err == nil && !st.Held && st.Mine && st.Ended[0].Outcome == dchannel.LockForced {
				st.Held, st.Ended, st.TTL, st.Remaining = true, st.Ended[1:], ttl, ttl
			}
			return st, err
		}
	})},
	{"NoGhostLock", "a repeated Acquire finds the lock taken, by itself", breaking(func(_ *lab, b *broken) {
		var mu sync.Mutex
		mine := map[dchannel.ID]bool{}
		b.acquire = func(ctx context.Context, channel string, l dchannel.Lease) (dchannel.LockState, error) {
			st, err := b.locker().Acquire(ctx, channel, l)
			mu.Lock()
			defer mu.Unlock()
			if mine[l.Token] && st.Held {
				st.Mine = false
			}
			mine[l.Token] = mine[l.Token] || err == nil && st.Held && st.Mine
			return st, err
		}
	})},
	{"NoLostWakeup", "a watch is live a little after it has returned", breaking(func(_ *lab, b *broken) {
		b.watchLock = func(ctx context.Context, channel string, hint func()) (dchannel.Subscription, error) {
			var mu sync.Mutex
			live := false
			time.AfterFunc(30*time.Millisecond, func() {
				mu.Lock()
				defer mu.Unlock()
				live = true
			})
			return b.locker().WatchLock(ctx, channel, func() {
				mu.Lock()
				defer mu.Unlock()
				if live {
					hint()
				}
			})
		}
	})},
	{"LockCleanup", "the end of a watch leaves it on the server", breaking(func(_ *lab, b *broken) {
		b.watchLock = func(ctx context.Context, channel string, hint func()) (dchannel.Subscription, error) {
			// Past the line, which allows no second one.
			_, err := b.Backend.(*line).Backend.WatchLock(ctx, channel, hint)
			return unended{}, err
		}
	})},
}

// retold returns st with one outcome in place of another.
func retold(st dchannel.LockState, from, to dchannel.LockOutcome) dchannel.LockState {
	st.Ended = slices.Clone(st.Ended)
	for i := range st.Ended {
		if st.Ended[i].Outcome == from {
			st.Ended[i].Outcome = to
		}
	}
	return st
}

var _ dchannel.Locker = (*broken)(nil)

func (b *broken) locker() dchannel.Locker { return b.Backend.(dchannel.Locker) }

// numbered returns st with its fences changed.
func (b *broken) numbered(st dchannel.LockState, err error) (dchannel.LockState, error) {
	if b.fences != nil && err == nil {
		st = b.fences(st)
	}
	return st, err
}

func (b *broken) Acquire(ctx context.Context, channel string, l dchannel.Lease) (dchannel.LockState, error) {
	if b.acquire != nil {
		return b.acquire(ctx, channel, l)
	}
	return b.numbered(b.locker().Acquire(ctx, channel, l))
}

func (b *broken) Extend(ctx context.Context, channel string, token dchannel.ID, ttl time.Duration) (dchannel.LockState, error) {
	if b.extend != nil {
		return b.extend(ctx, channel, token, ttl)
	}
	return b.numbered(b.locker().Extend(ctx, channel, token, ttl))
}

func (b *broken) Release(ctx context.Context, channel string, token dchannel.ID) (dchannel.LockState, error) {
	if b.release != nil {
		return b.release(ctx, channel, token)
	}
	return b.numbered(b.locker().Release(ctx, channel, token))
}

func (b *broken) EndLock(ctx context.Context, channel string, fence uint64, o dchannel.LockOutcome) (dchannel.LockState, error) {
	if b.endLock != nil {
		return b.numbered(b.endLock(ctx, channel, fence, o))
	}
	return b.numbered(b.locker().EndLock(ctx, channel, fence, o))
}

func (b *broken) LockState(ctx context.Context, channel string) (dchannel.LockState, error) {
	if b.lockState != nil {
		return b.lockState(ctx, channel)
	}
	return b.numbered(b.locker().LockState(ctx, channel))
}

func (b *broken) WatchLock(ctx context.Context, channel string, hint func()) (dchannel.Subscription, error) {
	if b.watchLock != nil {
		return b.watchLock(ctx, channel, hint)
	}
	return b.locker().WatchLock(ctx, channel, hint)
}

// unended is a watch that does not end.
type unended struct{}

func (unended) Close() {}
