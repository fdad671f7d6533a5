package conformance

import (
	"context"
	"time"

	"github.com/dchannel/dchannel"
)

var costMutants = []mutant{
	{"OneUpstream", "a channel is subscribed twice", breaking(func(_ *lab, b *broken) {
		b.subscribe = func(ctx context.Context, channel string, sink dchannel.Sink) (dchannel.Subscription, error) {
			f := &filter{}
			second, err := b.Backend.(*line).Backend.Subscribe(ctx, channel, nobody{})
			if err != nil {
				return nil, err
			}
			f.onEnd = second.Close
			return f.through(ctx, b, channel, sink)
		}
	})},
	{"IdleCost", "every subscription polls", breaking(func(_ *lab, b *broken) {
		b.subscribe = func(ctx context.Context, channel string, sink dchannel.Sink) (dchannel.Subscription, error) {
			f := &filter{}
			var poll func()
			poll = func() {
				go func() { _, _ = b.Heads(context.Background(), []string{channel}) }()
				f.later(50*time.Millisecond, poll)
			}
			f.later(50*time.Millisecond, poll)
			return f.through(ctx, b, channel, sink)
		}
	})},
	{"NoLeak", "the end of a subscription leaves it on the server", breaking(func(_ *lab, b *broken) {
		b.subscribe = func(ctx context.Context, channel string, sink dchannel.Sink) (dchannel.Subscription, error) {
			f := &filter{sink: sink, sub: kept{b.Backend.(*line), channel}}
			_, err := b.Backend.Subscribe(ctx, channel, f)
			return f, err
		}
	})},
}

type nobody struct{}

func (nobody) Entry(dchannel.Entry)        {}
func (nobody) Resync(error)                {}
func (nobody) State(dchannel.State, error) {}

// kept is a subscription that does not end.
type kept struct {
	l       *line
	channel string
}

func (k kept) Close() {
	k.l.mu.Lock()
	defer k.l.mu.Unlock()
	delete(k.l.taken, k.channel)
}

var faultMutants = []mutant{
	{"Cut", "nobody looks for what was missed in a second cut", breaking(func(l *lab, b *broken) {
		b.subscribe = func(ctx context.Context, channel string, sink dchannel.Sink) (dchannel.Subscription, error) {
			f := &filter{}
			f.resync = func(reason error) {
				l.mu.Lock()
				again := l.cuts[b] > 1
				l.mu.Unlock()
				if !again {
					f.sink.Resync(reason)
				}
			}
			return f.through(ctx, b, channel, sink)
		}
	})},
	{"Blackhole", "nobody looks for what was missed in a silence", breaking(func(_ *lab, b *broken) {
		b.subscribe = func(ctx context.Context, channel string, sink dchannel.Sink) (dchannel.Subscription, error) {
			f := &filter{}
			f.resync = func(reason error) {
				if reason != errSilence { //nolint:errorlint // this very value
					f.sink.Resync(reason)
				}
			}
			return f.through(ctx, b, channel, sink)
		}
	})},
	{"Pause", "what is published while the server stands still is forgotten", breaking(func(l *lab, b *broken) {
		b.publish = func(ctx context.Context, channel string, f dchannel.Frame) (dchannel.Position, error) {
			if l.is(&l.paused) {
				return dchannel.Position{}, nil
			}
			return b.Backend.Publish(ctx, channel, f)
		}
	})},
	{"Restart", "subscriptions do not come back after a restart", breaking(func(l *lab, b *broken) {
		b.subscribe = func(ctx context.Context, channel string, sink dchannel.Sink) (dchannel.Subscription, error) {
			f := &filter{}
			restarts := func() int {
				l.mu.Lock()
				defer l.mu.Unlock()
				return l.restarts
			}
			born := restarts()
			f.entry = func(e dchannel.Entry) {
				if restarts() == born {
					f.sink.Entry(e)
				}
			}
			f.resync = func(reason error) {
				if restarts() == born {
					f.sink.Resync(reason)
				}
			}
			return f.through(ctx, b, channel, sink)
		}
	})},
	{"StateLoss", "the server begins anew and nobody says so", breaking(func(l *lab, b *broken) {
		b.subscribe = func(ctx context.Context, channel string, sink dchannel.Sink) (dchannel.Subscription, error) {
			f := &filter{}
			f.resync = func(reason error) {
				if !l.is(&l.losing) {
					f.sink.Resync(reason)
				}
			}
			f.state = func(s dchannel.State, reason error) {
				if !l.is(&l.losing) {
					f.sink.State(s, reason)
				}
			}
			return f.through(ctx, b, channel, sink)
		}
		b.read = func(ctx context.Context, channel string, after dchannel.Position, limit int) (dchannel.Page, error) {
			p, err := b.Backend.Read(ctx, channel, after, limit)
			p.Head.Incarnation = dchannel.ID{}
			return p, err
		}
		b.heads = func(ctx context.Context, channels []string) ([]dchannel.Head, error) {
			heads, err := b.Backend.Heads(ctx, channels)
			for i := range heads {
				heads[i].Incarnation = dchannel.ID{}
			}
			return heads, err
		}
	})},
}

var badInputMutants = []mutant{
	{"BadInput", "what the codec refuses is dropped, and no error", handles(func(ch *dchannel.Channel, _ dchannel.Backend) Handle {
		return ignoring{ch, dchannel.ErrCodec}
	})},
}
