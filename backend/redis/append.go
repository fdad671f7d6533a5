package redis

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/dchannel/dchannel"
)

// Publish appends f. A retry is looked for among the entries that are not older than
// the frame's first attempt; [dchannel.ErrUncertain] when retention has dropped some
// of those. When the log itself is gone, or was rewound by a server that lost its
// end, the frame is appended (again): the store has no trace of it, and a listener
// that has seen it knows its ID.
func (b *Backend) Publish(ctx context.Context, channel string, f dchannel.Frame) (dchannel.Position, error) {
	pos, err := b.publish(ctx, channel, f)
	if err != nil {
		return pos, fmt.Errorf("redis: publish: %w", err)
	}
	return pos, nil
}

func (b *Backend) publish(ctx context.Context, channel string, f dchannel.Frame) (dchannel.Position, error) {
	if len(f.Data) > maxFrame {
		return dchannel.Position{}, fmt.Errorf("%w: %d bytes, the limit is %d", dchannel.ErrTooLarge, len(f.Data), maxFrame)
	}
	sent, known := b.now()
	if !known {
		if _, err := b.loadIncarnation(ctx, ""); err != nil {
			return dchannel.Position{}, err
		}
		sent, _ = b.now()
	}
	at := time.Now()
	answer, err := b.run(ctx, appendScript, b.logKeys(channel), []any{
		f.ID.String(), f.Count, millis(f.Age), sent,
		b.o.messages, b.ttl.stream, b.ttl.head, b.refreshIncarnation(at), b.keys.push(channel),
	}, f.Data)
	if err != nil {
		return dchannel.Position{}, err
	}
	what, pos, err := b.parseAnswer(at, answer)
	switch {
	case err != nil:
		return pos, err
	case what == "ok":
		return pos, nil
	case what == "closed":
		return dchannel.Position{}, dchannel.ErrChanClosed
	case f.Age == 0:
		// This attempt came so late that the script looked for another one of its
		// kind. There is none: it was the first, and it did nothing.
		return dchannel.Position{}, fmt.Errorf("%w: the frame reached the server too late", dchannel.ErrUnavailable)
	default:
		return dchannel.Position{}, fmt.Errorf("%w: an earlier attempt may have been dropped by retention", dchannel.ErrForgotten)
	}
}

// MarkClosed appends the marker. keep is rounded up to milliseconds, and to a second.
func (b *Backend) MarkClosed(ctx context.Context, channel string, id dchannel.ID, keep time.Duration) (dchannel.Position, error) {
	at := time.Now()
	answer, err := b.run(ctx, closeScript, b.logKeys(channel),
		[]any{id.String(), millis(max(keep, time.Second))}, []byte(b.keys.push(channel)))
	var pos dchannel.Position
	if err == nil {
		_, pos, err = b.parseAnswer(at, answer)
	}
	if err != nil {
		return pos, fmt.Errorf("redis: close: %w", err)
	}
	return pos, nil
}

func (b *Backend) logKeys(channel string) []string {
	return []string{b.keys.head(channel), b.keys.stream(channel), b.keys.incarnation()}
}

// parseAnswer reads "what epoch seq time" and sets the clock.
func (b *Backend) parseAnswer(sent time.Time, answer string) (what string, pos dchannel.Position, err error) {
	var ms int64
	if _, err := fmt.Sscanf(answer, "%s %d %d %d", &what, &pos.Epoch, &pos.Seq, &ms); err != nil {
		return "", pos, fmt.Errorf("%w: the script's answer is not understood", dchannel.ErrUncertain)
	}
	b.told(sent, ms)
	return what, pos, nil
}

// refreshIncarnation returns the TTL that the append at the given time has to give
// to the incarnation, or 0 for leaving it alone: one append in idle/8 is enough.
func (b *Backend) refreshIncarnation(at time.Time) int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	if at.Sub(b.refreshed).Milliseconds() < b.ttl.head/8 {
		return 0
	}
	b.refreshed = at
	return b.ttl.incarnation
}

// loadIncarnation returns the memory of the server (see incarnation.lua), and sets
// the clock. If probe is not empty, the server publishes there.
func (b *Backend) loadIncarnation(ctx context.Context, probe string) (dchannel.ID, error) {
	at := time.Now()
	answer, err := b.run(ctx, incarnationScript, []string{b.keys.incarnation()}, b.incarnationArgs(), []byte(probe))
	if err != nil {
		// Whatever happened, nothing that anybody could be uncertain about.
		return dchannel.ID{}, harmless(err)
	}
	return b.parseIncarnation(at, answer)
}

func (b *Backend) incarnationArgs() []any {
	durable := "0"
	if b.o.durable {
		durable = "1"
	}
	return []any{dchannel.NewID().String(), b.ttl.incarnation, durable}
}

func (b *Backend) parseIncarnation(sent time.Time, answer string) (id dchannel.ID, err error) {
	f := strings.Fields(answer)
	if len(f) == 3 && parseID(&id, f[1]) {
		var ms int64
		if _, err := fmt.Sscan(f[2], &ms); err == nil {
			b.told(sent, ms)
			return id, nil
		}
	}
	return id, fmt.Errorf("%w: the incarnation's script gave an answer that is not understood", dchannel.ErrUnavailable)
}
