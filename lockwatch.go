package dchannel

import (
	"context"
	"errors"
	"sync"
	"time"
)

const (
	// lockLag is how long after the end of a lock's time its state is read: servers
	// are a little late. It doubles while the server still says held.
	lockLag    = 5 * time.Millisecond
	lockLagMax = 250 * time.Millisecond
	// lockRecheck bounds the time between two reads while somebody waits, should a
	// server lose a hint and nobody notice.
	lockRecheck = 30 * time.Second
)

// lockWatch follows a channel's lock for all who wait for it in this process: one
// upstream watch, one reader. Hints and timers only make it read; what it passes on are
// states that the backend has told.
type lockWatch struct {
	l      *local
	lk     Locker
	ctx    context.Context
	cancel context.CancelFunc
	before <-chan struct{} // closed when the watch before it is over; nil: there was none
	over   chan struct{}
	kick   chan struct{} // 1 buffered: read

	mu      sync.Mutex
	began   uint64 // reads, this one and earlier ones
	seen    lockView
	err     error         // final
	changed chan struct{} // closed at the next view; made on demand
}

// lockView is what one read has brought.
type lockView struct {
	state LockState
	at    time.Time // when the read began
	read  uint64    // its number
}

// joinLock returns the channel's watch, with one more user; leaveLock gives it up.
func (l *local) joinLock(lk Locker) *lockWatch {
	l.lockMu.Lock()
	defer l.lockMu.Unlock()
	if w := l.watch; w == nil || w.failed() {
		next := &lockWatch{l: l, lk: lk, over: make(chan struct{}), kick: make(chan struct{}, 1)}
		if w != nil {
			next.before = w.over
		} else {
			next.before = l.lastWatch
		}
		l.lastWatch = next.over
		next.ctx, next.cancel = context.WithCancel(l.s.ctx)
		l.watch, l.watchers = next, 0
		l.retain() // so that who comes next waits for the end of this one
		go next.run()
	}
	l.watchers++
	return l.watch
}

func (l *local) leaveLock(w *lockWatch) {
	l.lockMu.Lock()
	defer l.lockMu.Unlock()
	if l.watch != w {
		return // it failed, and another one took its place
	}
	if l.watchers--; l.watchers == 0 {
		w.cancel()
		l.watch = nil
	}
}

func (w *lockWatch) failed() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err != nil
}

// run watches, then reads, and reads again at every hint and when the lock's time is
// over. The order matters: what happens behind the read is hinted at.
func (w *lockWatch) run() {
	defer w.l.release()
	defer close(w.over)
	defer w.cancel()
	if w.before != nil {
		<-w.before
	}
	var sub Subscription
	_, err := retrying(w.ctx, 0, func(ctx context.Context) (err error) {
		sub, err = w.lk.WatchLock(ctx, w.l.name, w.poke)
		return err
	})
	if err != nil {
		w.fail(err)
		return
	}
	defer sub.Close()
	lag := lockLag
	for {
		v := lockView{}
		_, err = retrying(w.ctx, 0, func(ctx context.Context) (err error) {
			w.mu.Lock()
			w.began++
			v.read = w.began
			w.mu.Unlock()
			v.at = time.Now()
			v.state, err = w.lk.LockState(ctx, w.l.name)
			return err
		})
		if err != nil {
			w.fail(err)
			return
		}
		if !w.wait(w.show(v), v.state.Remaining, &lag) {
			return
		}
	}
}

// wait waits until it is time to read again. same says that the last read brought the
// generation of the one before.
func (w *lockWatch) wait(same bool, remaining time.Duration, lag *time.Duration) bool {
	due := lockRecheck
	if !same || remaining > *lag {
		*lag = lockLag
	} else {
		*lag = min(2**lag, lockLagMax)
	}
	if remaining > 0 {
		due = min(due, remaining+*lag)
	}
	t := time.NewTimer(due)
	defer t.Stop()
	select {
	case <-w.kick:
	case <-t.C:
	case <-w.ctx.Done():
		return false
	}
	return true
}

// poke makes the watch read.
func (w *lockWatch) poke() {
	select {
	case w.kick <- struct{}{}:
	default:
	}
}

// show passes on what was read, and tells whether the generation is the same as before.
func (w *lockWatch) show(v lockView) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	same := w.seen.read > 0 && w.seen.state.Fence == v.state.Fence && w.seen.state.Held == v.state.Held
	w.seen = v
	w.signal()
	return same
}

func (w *lockWatch) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.err = err
	w.signal()
}

func (w *lockWatch) signal() {
	if w.changed != nil {
		close(w.changed)
		w.changed = nil
	}
}

// fresh returns the number of the first read that begins after this call, and has it
// begin.
func (w *lockWatch) fresh() uint64 {
	w.mu.Lock()
	n := w.began + 1
	w.mu.Unlock()
	w.poke()
	return n
}

var errWoken = errors.New("woken")

// next waits for read n or a later one. It returns errWoken when wake is ready, or after
// the given time (0: never).
func (w *lockWatch) next(ctx context.Context, n uint64, wake <-chan struct{}, after time.Duration) (lockView, error) {
	var timeout <-chan time.Time
	if after > 0 {
		t := time.NewTimer(after)
		defer t.Stop()
		timeout = t.C
	}
	for {
		w.mu.Lock()
		v, err := w.seen, w.err
		if err == nil && v.read < n && w.changed == nil {
			w.changed = make(chan struct{})
		}
		changed := w.changed
		w.mu.Unlock()
		switch {
		case err != nil:
			return v, err
		case v.read >= n:
			return v, nil
		}
		select {
		case <-changed:
		case <-wake:
			return v, errWoken
		case <-timeout:
			return v, errWoken
		case <-ctx.Done():
			return v, ctx.Err()
		}
	}
}

// latest returns the last view.
func (w *lockWatch) latest() lockView {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.seen
}

// turn is a place in the line of those who wait, in this process, to lock a channel: the
// first one asks the backend, the others wait for their turn.
type turn struct {
	first chan struct{} // closed when it is the first
	now   chan struct{} // 1 buffered: the lock was released here, go on at once
}

// maxStreak is how many times in a row a lock is handed over in this process before
// others get the same chance.
const maxStreak = 16

func (l *local) lineUp() *turn {
	t := &turn{first: make(chan struct{}), now: make(chan struct{}, 1)}
	l.lockMu.Lock()
	defer l.lockMu.Unlock()
	l.turns = append(l.turns, t)
	if len(l.turns) == 1 {
		close(t.first)
	}
	return t
}

// stepOut takes t out of the line. won says that it has the lock.
func (l *local) stepOut(t *turn, won bool) {
	l.lockMu.Lock()
	defer l.lockMu.Unlock()
	for i, x := range l.turns {
		if x != t {
			continue
		}
		l.turns[i] = nil
		l.turns = append(l.turns[:i:i], l.turns[i+1:]...)
		if i > 0 || len(l.turns) == 0 {
			return
		}
		close(l.turns[0].first)
		select {
		case <-t.now:
			if !won { // it will not use it
				l.turns[0].now <- struct{}{}
			}
		default:
		}
		return
	}
}

// handOver lets the first in this process's line go on at once, after a release here.
func handOver(b Backend, name string) {
	l := find(b, name)
	if l == nil {
		return
	}
	l.lockMu.Lock()
	defer l.lockMu.Unlock()
	if len(l.turns) == 0 || l.streak >= maxStreak {
		l.streak = 0
		return
	}
	l.streak++
	select {
	case l.turns[0].now <- struct{}{}:
	default:
	}
}

// lostRace notes that another process has the lock.
func (l *local) lostRace() {
	l.lockMu.Lock()
	defer l.lockMu.Unlock()
	l.streak = 0
}
