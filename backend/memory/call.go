package memory

import (
	"context"
	"fmt"

	"github.com/dchannel/dchannel"
)

// kind tells what an unfinished call leaves behind.
type kind bool

const (
	read  kind = false // nothing: it can be taken back
	write kind = true  // it is on its way, and may still be done
)

// waiting is a call that the paused store has not answered.
type waiting struct {
	run  func()
	done chan struct{}
	ran  bool // under Store.mu
}

// call runs op, now or, if the store is paused, when it goes on.
func call[T any](ctx context.Context, b *Backend, k kind, op func(force bool) (T, error)) (T, error) {
	var none T
	if err := b.ready(ctx); err != nil {
		return none, err
	}
	v, err := op(false)
	if err == errPaused { //nolint:errorlint // our own, never wrapped
		if waitErr := b.later(ctx, k, func() { v, err = op(true) }); waitErr != nil {
			return none, waitErr
		}
	}
	if k == write && b.replyLost() {
		return none, errReplyLost
	}
	return v, err
}

// publishLater is the rest of Publish for a paused store. It is apart so that what
// the closure needs is not on the heap for every append.
func (b *Backend) publishLater(ctx context.Context, channel string, f dchannel.Frame, since int64) (pos dchannel.Position, err error) {
	var done dchannel.Position
	var doneErr error
	err = b.later(ctx, write, func() { done, doneErr = b.store.append(channel, f, since, true) })
	if err != nil {
		return pos, err
	}
	if b.replyLost() {
		return pos, errReplyLost
	}
	return done, doneErr
}

// later runs run when the store is not paused, in order of arrival. On an error it
// did not run; but a write stays in the queue, as it would stay in the buffers of
// a server that stands still, and will be done at Resume.
func (b *Backend) later(ctx context.Context, k kind, run func()) error {
	s := b.store
	s.mu.Lock()
	if !s.gate.Load() { // it went on meanwhile
		run()
		s.mu.Unlock()
		return nil
	}
	w := &waiting{run: run, done: make(chan struct{})}
	s.queue = append(s.queue, w)
	b.mu.Lock()
	broken := b.broken
	b.mu.Unlock()
	s.mu.Unlock()

	var err, cause error
	select {
	case <-w.done:
		return nil
	case <-ctx.Done():
		err, cause = ctx.Err(), ctx.Err()
	case <-broken:
		f := b.down.Load()
		if f == nil { // healed meanwhile; what the cut broke stays broken
			f = &fault{err: fmt.Errorf("%w: %w", dchannel.ErrUnavailable, errBroken), cause: errBroken}
		}
		err, cause = f.err, f.cause
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if w.ran {
		return nil
	}
	if k == write { // one sentinel only: "surely not done" would be wrong here
		return fmt.Errorf("%w: %w", dchannel.ErrUncertain, cause)
	}
	w.run = nil
	return err
}

// goOn answers the calls that wait, in order. The gate is still up and Store.mu
// held, so nothing overtakes them.
func (s *Store) goOn() {
	for _, w := range s.queue {
		if w.run != nil {
			w.run()
		}
		w.ran = true
		close(w.done)
	}
	s.queue = nil
}
