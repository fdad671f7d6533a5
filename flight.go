package dchannel

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// fly sends batch after batch until the queue is empty.
func (p *publisher) fly() {
	defer p.local.release()
	for {
		p.mu.Lock()
		if len(p.queue) == 0 {
			p.queue = nil
			p.busy.Store(false)
			p.mu.Unlock()
			return
		}
		b := p.queue[0]
		p.mu.Unlock()

		err := p.deliver(b)

		p.mu.Lock()
		if p.down = nil; err != nil && !final(err) {
			// For those behind it, which were not tried, this is surely not sent.
			p.down = err
			if !errors.Is(err, ErrUnavailable) {
				p.down = fmt.Errorf("%w: %v", ErrUnavailable, err) //nolint:errorlint // not its ErrUncertain
			}
		}
		p.queue[0] = nil
		p.queue = p.queue[1:]
		p.freed(max(0, len(b.data)-1))
		for _, w := range b.waiters {
			w.done <- err
		}
		p.mu.Unlock()
		for _, a := range b.async {
			a.h.async.end(a.n, err)
			if err == nil {
				a.h.published.Add(uint64(a.n))
			} else if errors.Is(err, ErrChanClosed) {
				a.h.sawClose()
			}
		}
	}
}

// deliver tries to append b until the outcome is known, its time is over, or nobody
// waits for it any more.
func (p *publisher) deliver(b *batch) error {
	s := p.local.s
	uncertain := b.sent
	var wait backoff
	for {
		p.mu.Lock()
		if b.count == 0 && !b.closing || b.abandoned() {
			defer p.mu.Unlock()
			return b.outcome(uncertain)
		}
		left := b.timeout - time.Since(b.queued)
		if left <= 0 && b.began.IsZero() && p.down != nil {
			// It stood in line behind one that failed for longer than it has time.
			defer p.mu.Unlock()
			b.sent = true
			return p.down
		}
		b.sent = true
		f := Frame{ID: b.id, Count: b.count, Data: b.data}
		if !b.began.IsZero() {
			f.Age = max(1, time.Since(b.began))
		} else {
			b.began = time.Now()
			left = b.timeout // a queue that is long is no outage
		}
		ctx, done := context.WithTimeout(s.ctx, max(min(attempt, left), 10*time.Millisecond))
		b.giveUp = done
		p.mu.Unlock()

		var err error
		if b.closing {
			_, err = s.backend.MarkClosed(ctx, p.local.name, b.id, b.keep)
		} else {
			_, err = s.backend.Publish(ctx, p.local.name, f)
		}
		done()
		switch {
		case err == nil:
			return nil
		case errors.Is(err, ErrChanClosed), errors.Is(err, ErrForgotten):
			return err
		case errors.Is(err, ErrUncertain):
			uncertain = true
		case final(err):
			if uncertain {
				err = fmt.Errorf("%w: %w", ErrUncertain, certainly(err))
			}
			return err
		}
		p.mu.Lock()
		if b.last == nil || !errors.Is(err, context.Canceled) {
			b.last = err // and not just that we gave up
		}
		b.sent = uncertain
		p.mu.Unlock()

		left = b.timeout - time.Since(b.queued)
		ctx, done = context.WithTimeout(s.ctx, left)
		again := left > 0 && wait.sleep(ctx)
		done()
		if !again {
			p.mu.Lock()
			defer p.mu.Unlock()
			b.sent = true // too late to take anything back
			return b.outcome(uncertain)
		}
	}
}

// outcome is what is known when b is given up.
func (b *batch) outcome(uncertain bool) error {
	switch {
	case uncertain:
		return fmt.Errorf("%w: %w", ErrUncertain, certainly(b.last))
	case b.last == nil: // never tried
		return context.Canceled
	}
	return b.last
}

// abandoned: nobody waits for the outcome.
func (b *batch) abandoned() bool {
	if len(b.async) > 0 {
		return false
	}
	for _, w := range b.waiters {
		if !w.gone {
			return false
		}
	}
	return true
}

// certainly wraps a cause so that it no longer claims, by ErrUnavailable or
// ErrRefused, that surely nothing happened; what else it is stays.
func certainly(err error) error {
	if errors.Is(err, ErrUnavailable) || errors.Is(err, ErrRefused) {
		return errors.New(err.Error())
	}
	return err
}
