package memory

import (
	"context"
	"slices"
	"time"

	"github.com/dchannel/dchannel"
)

// lock is a channel's lock. Its slot has one from the first Acquire until a day after
// the last generation's end, and guards it.
type lock struct {
	fence uint64
	held  bool
	token dchannel.ID
	ttl   time.Duration
	until time.Duration // by Store.uptime: the deadline, or when it ended
	info  string
	ended []ending // newest first
	line  []place
}

type ending struct {
	dchannel.LockEnd
	token dchannel.ID
}

// place is one in the line.
type place struct {
	lease dchannel.Lease
	seen  time.Duration
}

const (
	lockMemory = 24 * time.Hour
	// lockEnds is how many ends are remembered.
	lockEnds = 8
)

var _ dchannel.Locker = (*Backend)(nil)

// Acquire implements [dchannel.Locker]. A TTL is rounded up to a millisecond.
func (b *Backend) Acquire(ctx context.Context, channel string, l dchannel.Lease) (dchannel.LockState, error) {
	return b.onLock(ctx, channel, l.Token, func(sl *slot, now time.Duration) error {
		if sl.closed {
			return dchannel.ErrChanClosed
		}
		sl.acquire(l, now)
		return nil
	})
}

// Extend implements [dchannel.Locker].
func (b *Backend) Extend(ctx context.Context, channel string, token dchannel.ID, ttl time.Duration) (dchannel.LockState, error) {
	return b.onLock(ctx, channel, token, func(sl *slot, now time.Duration) error {
		if k := sl.lock; k != nil && k.held && k.token == token {
			k.ttl = duration(millis(ttl))
			k.until = now + k.ttl
			sl.store.sweepBy(sl.deadline())
		}
		return nil
	})
}

// Release implements [dchannel.Locker].
func (b *Backend) Release(ctx context.Context, channel string, token dchannel.ID) (dchannel.LockState, error) {
	return b.onLock(ctx, channel, token, func(sl *slot, now time.Duration) error {
		k := sl.lock
		if k == nil {
			return nil
		}
		k.line = slices.DeleteFunc(k.line, func(p place) bool { return p.lease.Token == token })
		if k.held && k.token == token {
			sl.endLock(dchannel.LockReleased, now)
		}
		return nil
	})
}

// EndLock implements [dchannel.Locker]. LockClosed sends the line home.
func (b *Backend) EndLock(ctx context.Context, channel string, fence uint64, outcome dchannel.LockOutcome) (dchannel.LockState, error) {
	return b.onLock(ctx, channel, dchannel.ID{}, func(sl *slot, now time.Duration) error {
		if k := sl.lock; k != nil && k.held && (fence == 0 || fence == k.fence) {
			sl.endLock(outcome, now)
		}
		return nil
	})
}

// onLock runs op on channel's slot, where what has expired has ended, and returns the
// lock's state behind it, as token sees it.
func (b *Backend) onLock(ctx context.Context, channel string, token dchannel.ID, op func(sl *slot, now time.Duration) error) (dchannel.LockState, error) {
	return call(ctx, b, write, func(force bool) (dchannel.LockState, error) {
		sl, err := b.store.enter(channel, force)
		if err != nil {
			return dchannel.LockState{}, err
		}
		defer b.store.leave(sl)
		sl.expire(b.store.now())
		now := b.store.uptime()
		if err := op(sl, now); err != nil {
			return dchannel.LockState{}, err
		}
		return sl.lockState(token, now), nil
	})
}

// LockState implements [dchannel.Locker].
func (b *Backend) LockState(ctx context.Context, channel string) (dchannel.LockState, error) {
	return call(ctx, b, read, func(force bool) (dchannel.LockState, error) {
		sl, _, err := b.store.find(channel, force)
		if err != nil {
			return dchannel.LockState{}, err
		}
		b.store.shard(channel).calls.Add(1)
		if sl == nil {
			return dchannel.LockState{}, nil
		}
		defer b.store.leave(sl)
		sl.expire(b.store.now())
		return sl.lockState(dchannel.ID{}, b.store.uptime()), nil
	})
}

// WatchLock implements [dchannel.Locker]. There is no hint at an expiry: who waits
// for one has the time left.
func (b *Backend) WatchLock(ctx context.Context, channel string, hint func()) (dchannel.Subscription, error) {
	return call(ctx, b, read, func(force bool) (dchannel.Subscription, error) {
		b.mu.Lock()
		defer b.mu.Unlock()
		if f := b.down.Load(); f != nil {
			return nil, f.err
		}
		sl, err := b.store.enter(channel, force)
		if err != nil {
			return nil, err
		}
		w := &lockWatch{backend: b, slot: sl, hint: hint}
		sl.watches = append(sl.watches, w)
		b.watches[w] = struct{}{}
		sl.mu.Unlock()
		return w, nil
	})
}

// ExpireLock ends what is held on channel as a TTL does that is over, at once: for
// tests of code that must not outlive its lock. Without a lock that is held, it does
// nothing.
//
// The holder is told by its next Extend or CloseLockedUntil, which return
// ErrLockExpired or ErrLockLost, or by the end of its own time; who waits is woken.
func (s *Store) ExpireLock(channel string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sl, _, _ := s.find(channel, true)
	if sl == nil {
		return
	}
	defer s.leave(sl)
	sl.expire(s.now())
	if sl.lock != nil && sl.lock.held {
		sl.endLock(dchannel.LockExpired, s.uptime())
	}
}

// LockWatches returns how many watches channel's lock has, those of all backends
// together.
func (s *Store) LockWatches(channel string) int {
	sl, _, _ := s.find(channel, true)
	if sl == nil {
		return 0
	}
	defer sl.mu.Unlock()
	return len(sl.watches)
}

// uptime is the time that locks live by.
func (s *Store) uptime() time.Duration { return time.Since(s.boot) }

// acquire begins a generation for l, lines it up, or does nothing. The slot is locked,
// here and below.
func (sl *slot) acquire(l dchannel.Lease, now time.Duration) {
	k := sl.lock
	if k == nil {
		k = &lock{}
		sl.lock = k
	}
	switch {
	case k.fence != 0 && k.token == l.Token:
	case slices.ContainsFunc(k.ended, func(e ending) bool { return e.token == l.Token }):
	case !k.held:
		sl.beginLock(l, now)
	case l.Fair:
		i := slices.IndexFunc(k.line, func(p place) bool { return p.lease.Token == l.Token })
		if i >= 0 && k.line[i].left(now) {
			k.line = slices.Delete(k.line, i, i+1) // too late: to the end of the line
			i = -1
		}
		if i >= 0 {
			k.line[i].seen = now
		} else {
			k.line = append(k.line, place{l, now})
		}
	}
}

// left tells that the place is lost.
func (p place) left(now time.Duration) bool { return now-p.seen > p.lease.TTL }

func (sl *slot) beginLock(l dchannel.Lease, now time.Duration) {
	k := sl.lock
	k.fence, k.held, k.token, k.info = sl.store.nextEpoch(), true, l.Token, l.Info
	k.ttl = duration(millis(l.TTL))
	k.until = now + k.ttl
	sl.store.sweepBy(sl.deadline())
	sl.hintLock()
}

// endLock ends the generation, and passes the lock on to the first in line.
func (sl *slot) endLock(o dchannel.LockOutcome, at time.Duration) {
	k := sl.lock
	k.held, k.until = false, at
	k.ended = slices.Insert(k.ended, 0, ending{dchannel.LockEnd{Fence: k.fence, Outcome: o}, k.token})
	k.ended = k.ended[:min(len(k.ended), lockEnds)]
	if o == dchannel.LockClosed {
		k.line = nil
	}
	sl.store.sweepBy(sl.deadline())
	now := sl.store.uptime()
	for len(k.line) > 0 {
		first := k.line[0]
		k.line = slices.Delete(k.line, 0, 1)
		if !first.left(now) {
			sl.beginLock(first.lease, now)
			return
		}
	}
	sl.hintLock()
}

// expireLock ends a generation whose time is over, and forgets old ones.
func (sl *slot) expireLock() {
	k := sl.lock
	if k == nil {
		return
	}
	now := sl.store.uptime()
	if k.held && now >= k.until {
		sl.endLock(dchannel.LockExpired, k.until)
	}
	if !k.held && now > k.until+lockMemory {
		sl.lock = nil
	}
}

// loseLock forgets the lock.
func (sl *slot) loseLock() { sl.lock = nil }

// lockDeadline returns when the lock can be forgotten, in the store's milliseconds.
func (sl *slot) lockDeadline() int64 {
	return sl.store.boot.UnixMilli() + millis(sl.lock.until+lockMemory) + 1
}

func (sl *slot) lockState(token dchannel.ID, now time.Duration) dchannel.LockState {
	k := sl.lock
	if k == nil {
		return dchannel.LockState{}
	}
	st := dchannel.LockState{
		Fence: k.fence, Held: k.held, Token: k.token, TTL: k.ttl, Info: k.info,
		Mine: token != dchannel.ID{} && k.token == token,
	}
	if k.held {
		st.Remaining = max(duration(millis(k.until-now)), time.Millisecond)
	}
	for _, e := range k.ended {
		st.Ended = append(st.Ended, e.LockEnd)
	}
	for _, p := range k.line {
		if !p.left(now) {
			st.Waiting++
		}
	}
	return st
}

// lockWatch is one backend's watch of one channel's lock.
type lockWatch struct {
	backend *Backend
	slot    *slot
	hint    func()
}

// hintLock calls the hints of all who are connected.
func (sl *slot) hintLock() {
	for _, w := range sl.watches {
		if w.backend.down.Load() == nil {
			w.hint()
		}
	}
}

// Close implements [dchannel.Subscription].
func (w *lockWatch) Close() {
	b := w.backend
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, open := b.watches[w]; !open {
		return
	}
	delete(b.watches, w)
	w.end()
}

// end takes w out of its slot. Backend.mu is held.
func (w *lockWatch) end() {
	sl := w.slot
	sl.mu.Lock()
	i := slices.Index(sl.watches, w)
	sl.watches = slices.Delete(sl.watches, i, i+1)
	sl.store.leave(sl)
}

// resume calls the hint, for hints may have been missed. Backend.mu is held.
func (w *lockWatch) resume() {
	w.slot.mu.Lock()
	defer w.slot.mu.Unlock()
	w.hint()
}
