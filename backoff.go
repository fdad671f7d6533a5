package dchannel

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"
)

// final reports that trying again is of no use.
func final(err error) bool {
	return !errors.Is(err, ErrUnavailable) && !errors.Is(err, ErrUncertain) &&
		!errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, context.Canceled)
}

// backoff waits longer each time, with jitter.
type backoff struct{ d time.Duration }

// sleep reports false when ctx ended first.
func (b *backoff) sleep(ctx context.Context) bool {
	b.d = min(max(2*b.d, backoffMin), backoffMax)
	t := time.NewTimer(b.d/2 + rand.N(b.d/2)) //nolint:gosec // jitter
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
