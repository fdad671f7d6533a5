package etcd

import (
	"context"
	"fmt"
	"time"

	"github.com/dchannel/dchannel"
)

// clockSlack is how far the clocks of two appending processes may be apart before a retry in another
// process than the first attempt's is judged wrongly.
const clockSlack = time.Minute

// settle finds out what became of the earlier attempts to append a. With found unset it is
// certain that they have not been done, and that none that is still on its way can be done after an
// attempt on the head that is now believed: it has the same condition, so one of the two loses.
func (b *Backend) settle(ctx context.Context, a appendage, c *belief, age time.Duration) (_ dchannel.Position, found bool, _ error) {
	from, known := b.tails.floor(a.entry.ID)
	if known && !from.sent {
		return dchannel.Position{}, false, nil
	}
	uncertain := func(why string) error { return fmt.Errorf("%w: %s", dchannel.ErrForgotten, why) }
	start := from.Position
	head, next := tail{}, start
	oldest := time.Duration(-1) // age of the first entry seen, when it does not continue the floor
	for first := true; ; first = false {
		page, err := b.page(ctx, a.name, next, 64)
		if err != nil {
			return dchannel.Position{}, false, err
		}
		if page.head.Epoch != next.Epoch && !first {
			return dchannel.Position{}, false, uncertain("the log was replaced while it was searched")
		}
		if known && start.Epoch != 0 && page.head.Epoch != start.Epoch {
			return dchannel.Position{}, false, uncertain("the log that it was sent to has gone")
		}
		if next.Epoch != page.head.Epoch {
			next = dchannel.Position{Epoch: page.head.Epoch}
		}
		head = page.head
		if head != (tail{}) && head.id == a.entry.ID {
			b.tails.set(c, &head)
			b.tails.settled(a.entry.ID)
			return head.Position, true, nil
		}
		for _, e := range page.entries {
			if e.ID == a.entry.ID {
				b.tails.settled(a.entry.ID)
				return e.Position, true, nil
			}
			if e.First() != next.Seq+1 {
				if known || next.Seq != 0 {
					return dchannel.Position{}, false, uncertain("retention has dropped what came after the first attempt")
				}
				oldest = time.Since(time.UnixMilli(e.Time))
			}
			next.Seq = e.Seq
		}
		if !page.more {
			break
		}
	}
	if next.Seq != head.Seq {
		return dchannel.Position{}, false, uncertain("retention has dropped what came after the first attempt")
	}
	if oldest >= 0 && oldest < age+clockSlack {
		return dchannel.Position{}, false, uncertain("retention no longer reaches back to the first attempt")
	}
	b.tails.set(c, &head)
	if head.closed {
		b.tails.settled(a.entry.ID)
		return dchannel.Position{}, false, dchannel.ErrChanClosed
	}
	return dchannel.Position{}, false, nil
}
