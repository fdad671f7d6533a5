package conformance

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/dchannel/dchannel"
)

// What follows is the blackhole for locks.

var _ dchannel.Locker = (*line)(nil)

func (l *line) Acquire(ctx context.Context, channel string, lease dchannel.Lease) (st dchannel.LockState, err error) {
	if err = l.silence(ctx, dchannel.ErrUncertain); err != nil {
		return st, err
	}
	return l.Backend.Acquire(ctx, channel, lease)
}

func (l *line) Extend(ctx context.Context, channel string, token dchannel.ID, ttl time.Duration) (st dchannel.LockState, err error) {
	if err = l.silence(ctx, dchannel.ErrUncertain); err != nil {
		return st, err
	}
	return l.Backend.Extend(ctx, channel, token, ttl)
}

func (l *line) Release(ctx context.Context, channel string, token dchannel.ID) (st dchannel.LockState, err error) {
	if err = l.silence(ctx, dchannel.ErrUncertain); err != nil {
		return st, err
	}
	return l.Backend.Release(ctx, channel, token)
}

func (l *line) EndLock(ctx context.Context, channel string, fence uint64, outcome dchannel.LockOutcome) (st dchannel.LockState, err error) {
	if err = l.silence(ctx, dchannel.ErrUncertain); err != nil {
		return st, err
	}
	return l.Backend.EndLock(ctx, channel, fence, outcome)
}

func (l *line) LockState(ctx context.Context, channel string) (st dchannel.LockState, err error) {
	if err = l.silence(ctx, dchannel.ErrUnavailable); err != nil {
		return st, err
	}
	return l.Backend.LockState(ctx, channel)
}

func (l *line) WatchLock(ctx context.Context, channel string, hint func()) (dchannel.Subscription, error) {
	if err := l.silence(ctx, dchannel.ErrUnavailable); err != nil {
		return nil, err
	}
	// The core promises drivers that there is never a second one.
	l.mu.Lock()
	taken := l.watched[channel]
	if l.watched == nil {
		l.watched, l.hints = map[string]bool{}, map[string]func(){}
	}
	l.watched[channel] = true
	l.mu.Unlock()
	if taken {
		return nil, fmt.Errorf("a second watch of the lock of %q", channel)
	}
	sub, err := l.Backend.WatchLock(ctx, channel, func() {
		l.mu.Lock()
		silent := l.hole != nil
		l.mu.Unlock()
		if !silent {
			hint()
		}
	})
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		delete(l.watched, channel)
		return nil, err
	}
	l.hints[channel] = hint
	return &lineWatch{sub: sub, end: sync.OnceFunc(func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.watched, channel)
		delete(l.hints, channel)
	})}, nil
}

type lineWatch struct {
	sub dchannel.Subscription
	end func()
}

func (w *lineWatch) Close() {
	w.sub.Close()
	w.end()
}
