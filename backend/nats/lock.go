package nats

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/dchannel/dchannel"
)

// lockStep reads a lock and lets decide take the step from there, until nobody else was faster.
func (b *Backend) lockStep(ctx context.Context, name string, decide func(lockView) (dchannel.LockState, error)) (s dchannel.LockState, err error) {
	began := time.Now()
	for try := 0; ; try++ {
		err = b.retryMissing(ctx, func() error {
			v, err := b.lockView(ctx, name)
			if err == nil {
				s, err = decide(v)
			}
			return err
		})
		if err == nil {
			return s, nil
		}
		if !conflict(err) {
			return dchannel.LockState{}, err
		}
		if time.Since(began) > patience {
			return dchannel.LockState{}, mapError(errContended, false)
		}
		select {
		case <-time.After(rand.N(200 * time.Microsecond << min(try, 6))):
		case <-ctx.Done():
			return dchannel.LockState{}, ctx.Err()
		case <-b.closed:
			return dchannel.LockState{}, b.closeErr
		}
	}
}

// Acquire implements [dchannel.Locker]: one trip if it is refused, and three if it succeeds (look, write,
// and see that the log has not ended before). There are no lines: with l.Fair it returns errors.ErrUnsupported.
func (b *Backend) Acquire(ctx context.Context, channel string, l dchannel.Lease) (dchannel.LockState, error) {
	if l.Fair {
		return dchannel.LockState{}, fmt.Errorf("nats: waiting for a lock in a line: %w", errors.ErrUnsupported)
	}
	me := l.Token.String()
	return b.lockStep(ctx, channel, func(v lockView) (dchannel.LockState, error) {
		if v.used(me) {
			if v.Held && v.Token == me && v.begun { // by an attempt whose answer was lost
				if err := b.inTime(ctx, channel, v, v.place); err != nil {
					return dchannel.LockState{}, err
				}
			}
			return v.state(me), nil
		}
		if t, known := b.remembered(channel).known(b.life.Load()); known && t.closed {
			// It saves a generation that would end at once; what is known may be old.
			if closed, _, err := b.endOfLog(ctx, channel, v); err != nil || closed {
				return dchannel.LockState{}, orClosed(err)
			}
		}
		if v.Held {
			return v.state(me), nil
		}
		next := v
		next.lockRecord = lockRecord{
			Fence: b.nextFence(v), Token: me, Info: l.Info, Held: true, Ended: v.Ended,
			TTL: max(1, int64((l.TTL+time.Millisecond-1)/time.Millisecond)),
		}
		place, err := b.step(ctx, channel, v, next.lockRecord)
		if err != nil {
			return dchannel.LockState{}, err
		}
		if err := b.inTime(ctx, channel, next, place); err != nil {
			return dchannel.LockState{}, err
		}
		s := next.lockRecord.state(me)
		s.Remaining = s.TTL
		return s, nil
	})
}

// inTime ends the generation that began at place if the log had ended before: in one stream, places are
// an order of both. Nobody has been told of the generation as theirs by then.
func (b *Backend) inTime(ctx context.Context, channel string, v lockView, place uint64) error {
	closed, at, err := b.endOfLog(ctx, channel, v)
	if err != nil {
		return maybeDone(err)
	}
	if !closed || at > place {
		return nil
	}
	v.place = place
	next := v.lockRecord
	next.Held, next.Ended = false, v.endedAs(dchannel.LockClosed)
	if _, err := b.step(ctx, channel, v, next); err != nil && !conflict(err) {
		return maybeDone(err)
	}
	return orClosed(nil)
}

// maybeDone is the error of a step that was taken, when what has to follow it failed.
func maybeDone(err error) error {
	if isUncertain(err) {
		return err
	}
	return fmt.Errorf("%w: %w", dchannel.ErrUncertain, err)
}

func orClosed(err error) error {
	if err == nil {
		err = fmt.Errorf("%w: nats", dchannel.ErrChanClosed)
	}
	return err
}

// endOfLog tells whether the channel's log has ended, and at which place.
func (b *Backend) endOfLog(ctx context.Context, channel string, v lockView) (bool, uint64, error) {
	tails, _, err := b.tails(ctx, b.channel(channel))
	if err != nil {
		return false, 0, err
	}
	return tails[0].log(v.now) && tails[0].closed, tails[0].place, nil
}

// Extend implements [dchannel.Locker].
func (b *Backend) Extend(ctx context.Context, channel string, token dchannel.ID, ttl time.Duration) (dchannel.LockState, error) {
	me := token.String()
	return b.lockStep(ctx, channel, func(v lockView) (dchannel.LockState, error) {
		if !v.Held || v.Token != me {
			return v.state(me), nil
		}
		next := v.lockRecord
		next.TTL = max(1, int64((ttl+time.Millisecond-1)/time.Millisecond))
		return b.follow(ctx, channel, v, next, me)
	})
}

// Release implements [dchannel.Locker].
func (b *Backend) Release(ctx context.Context, channel string, token dchannel.ID) (dchannel.LockState, error) {
	me := token.String()
	return b.endLock(ctx, channel, me, dchannel.LockReleased, func(r lockRecord) bool { return r.Token == me })
}

// EndLock implements [dchannel.Locker].
func (b *Backend) EndLock(ctx context.Context, channel string, fence uint64, outcome dchannel.LockOutcome) (dchannel.LockState, error) {
	return b.endLock(ctx, channel, "", outcome, func(r lockRecord) bool { return fence == 0 || r.Fence == fence })
}

func (b *Backend) endLock(ctx context.Context, channel, me string, how dchannel.LockOutcome, which func(lockRecord) bool) (dchannel.LockState, error) {
	return b.lockStep(ctx, channel, func(v lockView) (dchannel.LockState, error) {
		if !v.Held || !which(v.lockRecord) {
			return v.state(me), nil
		}
		next := v.lockRecord
		next.Held, next.Ended = false, v.endedAs(how)
		return b.follow(ctx, channel, v, next, me)
	})
}

// follow takes a step within the generation of v, and tells what came of it: if the server took it after the
// hold was over, the generation has expired.
func (b *Backend) follow(ctx context.Context, channel string, v lockView, next lockRecord, me string) (dchannel.LockState, error) {
	next.Before = v.until(v.stamp).UnixNano()
	place, err := b.step(ctx, channel, v, next)
	if err != nil {
		return dchannel.LockState{}, err
	}
	now, err := b.outcomeOf(ctx, channel, place, next)
	if err != nil {
		return dchannel.LockState{}, maybeDone(err)
	}
	return now.state(me), nil
}

// LockState implements [dchannel.Locker].
func (b *Backend) LockState(ctx context.Context, channel string) (dchannel.LockState, error) {
	return b.lockStep(ctx, channel, func(v lockView) (dchannel.LockState, error) { return v.state(""), nil })
}
