package conformance

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/dchannel/dchannel"
)

// oddOnes do what the contract allows and what a driver's author may not expect a
// backend to do. They must pass: else the suite asks for more than is promised.
var oddOnes = []mutant{
	{"", "pushes come late, twice and in disorder, with resyncs for no reason; pages have one entry", breaking(func(_ *lab, b *broken) {
		b.subscribe = func(ctx context.Context, channel string, sink dchannel.Sink) (dchannel.Subscription, error) {
			f := &filter{}
			var held []dchannel.Entry
			n := 0
			flush := func() {
				for i := len(held) - 1; i >= 0; i-- { // the newest first
					f.sink.Entry(held[i])
				}
				held = nil
			}
			f.entry = func(e dchannel.Entry) {
				n++
				held = append(held, e)
				switch {
				case n%3 == 0: // and again
					flush()
					f.sink.Entry(e)
				case n%7 == 0:
					f.sink.Resync(errOdd)
					fallthrough
				default:
					f.later(time.Millisecond, flush)
				}
			}
			return f.through(ctx, b, channel, sink)
		}
		b.read = func(ctx context.Context, channel string, after dchannel.Position, limit int) (dchannel.Page, error) {
			p, err := b.Backend.Read(ctx, channel, after, limit)
			p.Entries = p.Entries[:min(len(p.Entries), 1)]
			return p, err
		}
	})},
	{"", "every seventh append is refused for the moment, every eleventh loses its reply, and all take a millisecond", breaking(func(_ *lab, b *broken) {
		if b.short { // what it has dropped it cannot tell from what never came: retries are ErrUncertain
			return
		}
		var n atomic.Int64
		b.publish = func(ctx context.Context, channel string, f dchannel.Frame) (dchannel.Position, error) {
			select {
			case <-time.After(time.Millisecond):
			case <-ctx.Done():
				return dchannel.Position{}, ctx.Err()
			}
			if _, err := b.Backend.Heads(ctx, nil); err != nil {
				return dchannel.Position{}, err
			}
			i := n.Add(1)
			if i%7 == 0 {
				return dchannel.Position{}, fmt.Errorf("%w: %w", dchannel.ErrUnavailable, errOdd)
			}
			pos, err := b.Backend.Publish(ctx, channel, f)
			if err == nil && i%11 == 0 {
				return dchannel.Position{}, fmt.Errorf("%w: %w", dchannel.ErrUncertain, errOdd)
			}
			return pos, err
		}
	})},
}
