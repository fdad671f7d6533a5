package conformance

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/memory"
)

var closeMutants = []mutant{
	{"CloseWakes", "the marker is found by a poll, 400 ms later", breaking(func(_ *lab, b *broken) {
		b.subscribe = func(ctx context.Context, channel string, sink dchannel.Sink) (dchannel.Subscription, error) {
			f := &filter{}
			f.entry = func(e dchannel.Entry) {
				if e.Closed {
					f.later(400*time.Millisecond, func() { f.sink.Entry(e) })
				} else {
					f.sink.Entry(e)
				}
			}
			return f.through(ctx, b, channel, sink)
		}
	})},
	{"CloseDrains", "a close overtakes what its process has queued", func() Harness {
		h, _ := harnessWith(func(_ *lab, b *broken) {
			b.publish = func(ctx context.Context, channel string, f dchannel.Frame) (dchannel.Position, error) {
				if f.Count > 1 {
					<-time.After(20 * time.Millisecond) // the queue's turn is long enough to be overtaken
				}
				return b.Backend.Publish(ctx, channel, f)
			}
		})
		h.Wrap = func(ch *dchannel.Channel, b dchannel.Backend) Handle { return &hasty{Channel: ch, b: b} }
		return h
	}},
	{"CloseRacesPublish", "Publish on a closed channel returns nil", breaking(func(_ *lab, b *broken) {
		b.publish = func(ctx context.Context, channel string, f dchannel.Frame) (dchannel.Position, error) {
			pos, err := b.Backend.Publish(ctx, channel, f)
			if errors.Is(err, dchannel.ErrChanClosed) {
				return pos, nil
			}
			return pos, err
		}
	})},
	{"CloseDurable", "the marker is forgotten after a second, whatever was asked for", breaking(func(_ *lab, b *broken) {
		b.mark = func(ctx context.Context, channel string, id dchannel.ID, keep time.Duration) (dchannel.Position, error) {
			if keep < dchannel.DefaultCloseKeep {
				keep = time.Second
			}
			return b.Backend.MarkClosed(ctx, channel, id, keep)
		}
	})},
	{"CloseFinal", "IsClosed is false again after a while", handles(func(ch *dchannel.Channel, _ dchannel.Backend) Handle {
		return &fickle{Channel: ch}
	})},
	{"CloseIdempotent", "a second close fails", breaking(func(l *lab, b *broken) {
		b.mark = func(ctx context.Context, channel string, id dchannel.ID, keep time.Duration) (dchannel.Position, error) {
			l.mu.Lock()
			first, closed := l.closed[channel]
			l.mu.Unlock()
			if closed && first != id {
				return dchannel.Position{}, fmt.Errorf("%w: close of closed channel", dchannel.ErrRefused)
			}
			pos, err := b.Backend.MarkClosed(ctx, channel, id, keep)
			if err == nil {
				l.mu.Lock()
				l.closed[channel] = id
				l.mu.Unlock()
			}
			return pos, err
		}
	})},
	{"Cleanup", "an idle channel's head never expires", func() Harness { return onMemory(memory.WithIdleExpiry(time.Hour)) }},
	{"Cleanup", "Remove does nothing", breaking(func(_ *lab, b *broken) {
		b.remove = func(ctx context.Context, _ string) error {
			_, err := b.Heads(ctx, nil)
			return err
		}
	})},
}

// hasty closes past its own queue.
type hasty struct {
	*dchannel.Channel
	b      dchannel.Backend
	queued atomic.Bool
}

func (h *hasty) PublishAsync(ctx context.Context, msg any) error {
	err := h.Channel.PublishAsync(ctx, msg)
	if err == nil {
		h.queued.Store(true)
	}
	return err
}

func (h *hasty) Close() error {
	if h.queued.Load() && !h.Status().Closed {
		_, err := h.b.MarkClosed(context.Background(), h.Name(), dchannel.NewID(), time.Hour)
		return err
	}
	return h.Channel.Close()
}

type fickle struct {
	*dchannel.Channel
	said atomic.Int64
}

func (f *fickle) IsClosed() bool { return f.Channel.IsClosed() && f.said.Add(1) <= 3 }
