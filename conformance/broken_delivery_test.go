package conformance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/internal/frame"
)

var deliveryMutants = []mutant{
	{"RoundTrip", "payloads are cut at 4 KB", breaking(func(_ *lab, b *broken) {
		b.publish = func(ctx context.Context, channel string, f dchannel.Frame) (dchannel.Position, error) {
			return b.Backend.Publish(ctx, channel, rewrite(f, func(r *frame.Record) {
				r.Payload = r.Payload[:min(len(r.Payload), 4096)]
			}))
		}
	})},
	{"BinarySafe", "invalid UTF-8 is replaced", breaking(func(_ *lab, b *broken) {
		b.publish = func(ctx context.Context, channel string, f dchannel.Frame) (dchannel.Position, error) {
			return b.Backend.Publish(ctx, channel, rewrite(f, func(r *frame.Record) {
				r.Payload = bytes.ToValidUTF8(r.Payload, []byte("\ufffd"))
			}))
		}
	})},
	{"ReadyOnReturn", "a subscription is live 30 ms after Subscribe has returned", breaking(func(_ *lab, b *broken) {
		b.subscribe = func(ctx context.Context, channel string, sink dchannel.Sink) (dchannel.Subscription, error) {
			if _, err := b.Backend.Heads(ctx, nil); err != nil {
				return nil, err
			}
			late := &lateSub{}
			time.AfterFunc(30*time.Millisecond, func() {
				late.mu.Lock()
				defer late.mu.Unlock()
				if late.closed {
					return
				}
				var err error
				if late.sub, err = b.Backend.Subscribe(context.Background(), channel, sink); err != nil {
					sink.State(dchannel.StateFailed, err)
				}
			})
			return late, nil
		}
	})},
	{"FanOut", "only three processes of a channel are served", breaking(func(l *lab, b *broken) {
		b.subscribe = func(ctx context.Context, channel string, sink dchannel.Sink) (dchannel.Subscription, error) {
			f := &filter{}
			if l.nth(channel, b) >= 3 {
				f.entry = func(dchannel.Entry) {}
			}
			return f.through(ctx, b, channel, sink)
		}
	})},
	{"Isolation", "\"a b\" and \"a.b\" are one channel", breaking(func(_ *lab, b *broken) {
		key := func(channel string) string { return strings.ReplaceAll(channel, " ", ".") }
		b.publish = func(ctx context.Context, channel string, f dchannel.Frame) (dchannel.Position, error) {
			return b.Backend.Publish(ctx, key(channel), f)
		}
		b.mark = func(ctx context.Context, channel string, id dchannel.ID, keep time.Duration) (dchannel.Position, error) {
			return b.Backend.MarkClosed(ctx, key(channel), id, keep)
		}
		b.read = func(ctx context.Context, channel string, after dchannel.Position, limit int) (dchannel.Page, error) {
			return b.Backend.Read(ctx, key(channel), after, limit)
		}
		b.heads = func(ctx context.Context, channels []string) ([]dchannel.Head, error) {
			keys := make([]string, len(channels))
			for i, channel := range channels {
				keys[i] = key(channel)
			}
			return b.Backend.Heads(ctx, keys)
		}
		b.subscribe = func(ctx context.Context, channel string, sink dchannel.Sink) (dchannel.Subscription, error) {
			return b.Backend.Subscribe(ctx, key(channel), sink)
		}
		b.remove = func(ctx context.Context, channel string) error { return b.Backend.Remove(ctx, key(channel)) }
	})},
	{"Order", "where three processes publish, another one sees two neighbours swapped", breaking(swapNeighbours)},
	{"ExactlyOnce", "an append is repeated when its reply was lost", breaking(func(_ *lab, b *broken) {
		b.publish = func(ctx context.Context, channel string, f dchannel.Frame) (dchannel.Position, error) {
			if f.Age > 0 {
				f.ID, f.Age = dchannel.NewID(), 0
			}
			return b.Backend.Publish(ctx, channel, f)
		}
	})},
	{"NoSilentLoss", "what retention has dropped is passed over", handles(func(ch *dchannel.Channel, _ dchannel.Backend) Handle {
		return deaf{ch}
	})},
	{"Accepted", "with little time left, Publish returns nil although the server cannot be reached", breaking(func(_ *lab, b *broken) {
		b.publish = func(ctx context.Context, channel string, f dchannel.Frame) (dchannel.Position, error) {
			pos, err := b.Backend.Publish(ctx, channel, f)
			end, ok := ctx.Deadline()
			if errors.Is(err, dchannel.ErrUnavailable) && ok && time.Until(end) < time.Second {
				return pos, nil
			}
			return pos, err
		}
	})},
	{"SizeLimit", "what is too large is dropped, and no error", handles(func(ch *dchannel.Channel, _ dchannel.Backend) Handle {
		return ignoring{ch, dchannel.ErrTooLarge}
	})},
	{"PayloadOwnership", "all listeners of a process get the same slice", func() Harness {
		shared := &shared{slices: map[string][]byte{}}
		return handles(func(ch *dchannel.Channel, _ dchannel.Backend) Handle { return sharing{ch, shared} })()
	}},
	{"SlowListener", "a handle that does not read holds up the publishers of its process", func() Harness {
		crowd := &crowd{of: map[crowdKey][]*dchannel.Channel{}}
		return handles(func(ch *dchannel.Channel, b dchannel.Backend) Handle { return crowd.join(ch, b) })()
	}},
	{"CancelBlocked", "Listen returns 150 ms after its context's end", handles(func(ch *dchannel.Channel, _ dchannel.Backend) Handle {
		return lingering{ch}
	})},
}

// lateSub is a subscription that is not there yet.
type lateSub struct {
	mu     sync.Mutex
	closed bool
	sub    dchannel.Subscription
}

func (s *lateSub) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	if s.sub != nil {
		s.sub.Close()
	}
}

func swapNeighbours(l *lab, b *broken) {
	b.publish = func(ctx context.Context, channel string, f dchannel.Frame) (dchannel.Position, error) {
		l.mu.Lock()
		if l.publishers[channel] == nil {
			l.publishers[channel] = map[*broken]bool{}
		}
		l.publishers[channel][b] = true
		l.author[f.ID] = b
		l.mu.Unlock()
		return b.Backend.Publish(ctx, channel, f)
	}
	b.subscribe = func(ctx context.Context, channel string, sink dchannel.Sink) (dchannel.Subscription, error) {
		f := &filter{}
		if l.nth(channel, b) == 1 {
			var held *dchannel.Entry
			flush := func() {
				if held != nil {
					f.sink.Entry(*held)
					held = nil
				}
			}
			f.entry = func(e dchannel.Entry) {
				l.mu.Lock()
				crowded := len(l.publishers[channel]) >= 3
				swap := crowded && held != nil && held.Count == e.Count && !e.Closed && l.author[held.ID] != l.author[e.ID]
				l.mu.Unlock()
				if swap {
					held.Data, e.Data = e.Data, held.Data
				}
				flush()
				if swap || !crowded {
					f.sink.Entry(e)
					return
				}
				held = &e
				f.later(20*time.Millisecond, flush)
			}
		}
		return f.through(ctx, b, channel, sink)
	}
}

// deaf does not hear of losses.
type deaf struct{ *dchannel.Channel }

func (d deaf) Next(ctx context.Context) (dchannel.Message, error) {
	for {
		m, err := d.Channel.Next(ctx)
		var lost *dchannel.LostError
		if !errors.As(err, &lost) || lost.Count == 0 {
			return m, err
		}
	}
}

func (d deaf) Listen(ctx context.Context) (any, error) { return listenBy(ctx, d.Next) }

// ignoring takes one error for success.
type ignoring struct {
	*dchannel.Channel
	what error
}

func (i ignoring) Publish(ctx context.Context, msg any) error {
	return i.without(i.Channel.Publish(ctx, msg))
}

func (i ignoring) PublishAsync(ctx context.Context, msg any) error {
	return i.without(i.Channel.PublishAsync(ctx, msg))
}

func (i ignoring) without(err error) error {
	if errors.Is(err, i.what) {
		return nil
	}
	return err
}

type shared struct {
	mu     sync.Mutex
	slices map[string][]byte
}

type sharing struct {
	*dchannel.Channel
	all *shared
}

func (s sharing) Listen(ctx context.Context) (any, error) {
	m, err := s.Next(ctx)
	if err != nil {
		return nil, err
	}
	v, err := m.Value()
	if b, ok := v.([]byte); ok {
		s.all.mu.Lock()
		defer s.all.mu.Unlock()
		key := fmt.Sprint(s.Name(), m.Position)
		if s.all.slices[key] == nil {
			s.all.slices[key] = b
		}
		return s.all.slices[key], err
	}
	return v, err
}

type crowd struct {
	mu sync.Mutex
	of map[crowdKey][]*dchannel.Channel
}

type crowdKey struct {
	b    dchannel.Backend
	name string
}

type crowded struct {
	*dchannel.Channel
	crowd *crowd
	key   crowdKey
}

func (c *crowd) join(ch *dchannel.Channel, b dchannel.Backend) Handle {
	c.mu.Lock()
	defer c.mu.Unlock()
	key := crowdKey{b, ch.Name()}
	c.of[key] = append(c.of[key], ch)
	return crowded{ch, c, key}
}

func (c crowded) Publish(ctx context.Context, msg any) error {
	for {
		worst := uint64(0)
		c.crowd.mu.Lock()
		for _, ch := range c.crowd.of[c.key] {
			worst = max(worst, ch.Status().Lag)
		}
		c.crowd.mu.Unlock()
		if worst < 400 {
			return c.Channel.Publish(ctx, msg)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
}

type lingering struct{ *dchannel.Channel }

func (l lingering) Next(ctx context.Context) (dchannel.Message, error) {
	m, err := l.Channel.Next(ctx)
	if err != nil && ctx.Err() != nil {
		<-time.After(150 * time.Millisecond)
	}
	return m, err
}

func (l lingering) Listen(ctx context.Context) (any, error) { return listenBy(ctx, l.Next) }
