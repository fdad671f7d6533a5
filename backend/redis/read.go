package redis

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
	"unsafe"

	goredis "github.com/redis/go-redis/v9"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/internal/entry"
)

const (
	// firstRead is how many entries are asked for before their size is known.
	firstRead = 16
	// maxRead bounds what one XRANGE asks for: the server does nothing else meanwhile.
	maxRead = 2048
	// maxHeads bounds the keys of one MGET, for the same reason.
	maxHeads = 1024
)

// Read asks for a few entries first, and then, with their size known, for what is
// missing to limit: two or three round trips for a long catch-up, one for a short one.
// XRANGE has no limit in bytes, and a script that has one copies each payload twice.
func (b *Backend) Read(ctx context.Context, channel string, after dchannel.Position, limit int) (dchannel.Page, error) {
	page, err := aside(ctx, b, func() (dchannel.Page, error) { return b.read(ctx, channel, after, limit) })
	if err != nil {
		return dchannel.Page{}, fmt.Errorf("redis: read: %w", mapError(err, false))
	}
	return page, nil
}

func (b *Backend) read(ctx context.Context, channel string, after dchannel.Position, limit int) (page dchannel.Page, err error) {
	from, count, size := "("+after.String(), firstRead, 0
	for {
		if err := ctx.Err(); err != nil { // nobody waits for this any more
			return page, err
		}
		raw, head, err := b.readSome(ctx, channel, from, count)
		if err != nil {
			return page, err
		}
		page.Head = head
		if len(page.Entries) > 0 && page.Entries[0].Epoch != head.Epoch {
			// The log was removed and begun anew between two round trips.
			page.Entries, size, from = nil, 0, "("+oldest(head)
			continue
		}
		if after.Epoch > head.Epoch && head.Epoch != 0 && from == "("+after.String() {
			// The server's clock went back between the two logs.
			from = "(" + oldest(head)
			continue
		}
		for _, r := range raw {
			id, e, err := parseStreamEntry(r)
			if id != "" {
				from = "(" + id
			}
			if err != nil || e.Epoch != head.Epoch {
				b.foreign("stream", channel, err)
				continue
			}
			if size += len(e.Data); size > limit && len(page.Entries) > 0 {
				return page, nil
			}
			page.Entries = append(page.Entries, e)
		}
		if len(raw) < count || (size >= limit && len(page.Entries) > 0) {
			return page, nil
		}
		if n := len(page.Entries); n > 0 {
			average := float64(size)/float64(n) + 1
			count = int(min(math.Ceil(float64(limit-size)/average)+1, maxRead))
		}
	}
}

// oldest is before everything in the log of head.
func oldest(head dchannel.Head) string { return dchannel.Position{Epoch: head.Epoch}.String() }

// readSome makes one round trip: up to count entries, and then the head.
func (b *Backend) readSome(ctx context.Context, channel, from string, count int) ([]any, dchannel.Head, error) {
	var entries *goredis.Cmd
	heads, err := b.headsWith(ctx, []string{channel}, func(p goredis.Pipeliner) {
		entries = p.Do(ctx, "XRANGE", b.keys.stream(channel), from, "+", "COUNT", count)
	})
	if err != nil {
		return nil, dchannel.Head{}, err
	}
	raw, err := entries.Slice()
	return raw, heads[0], err
}

// Heads needs one round trip; with no channels, it is a PING.
func (b *Backend) Heads(ctx context.Context, channels []string) ([]dchannel.Head, error) {
	heads, err := aside(ctx, b, func() ([]dchannel.Head, error) {
		if len(channels) == 0 {
			return nil, b.client.Ping(ctx).Err()
		}
		return b.headsWith(ctx, channels, func(goredis.Pipeliner) {})
	})
	if err != nil {
		return nil, fmt.Errorf("redis: heads: %w", mapError(err, false))
	}
	return heads, nil
}

// headsWith reads heads and incarnation in one pipeline, behind what before puts in.
// The incarnation's script goes first: what is read behind it is of that server, or
// the connection breaks.
func (b *Backend) headsWith(ctx context.Context, channels []string, before func(goredis.Pipeliner)) ([]dchannel.Head, error) {
	for _, make := range []func([]string, []any) []any{incarnationScript.evalsha, incarnationScript.eval} {
		at := time.Now()
		p := b.client.Pipeline()
		incarnation := p.Do(ctx, make([]string{b.keys.incarnation()}, append(b.incarnationArgs(), ""))...)
		before(p)
		gets := b.getHeads(ctx, p, channels)
		_, err := p.Exec(ctx)
		if isNoScript(incarnation.Err()) {
			continue
		}
		if err != nil {
			return nil, err
		}
		text, err := incarnation.Text()
		if err != nil {
			return nil, err
		}
		id, err := b.parseIncarnation(at, text)
		if err != nil {
			return nil, err
		}
		return b.parseHeads(channels, gets, id)
	}
	return nil, errors.New("the server forgets its scripts")
}

func (b *Backend) getHeads(ctx context.Context, p goredis.Pipeliner, channels []string) (gets []*goredis.SliceCmd) {
	for len(channels) > 0 {
		n := min(len(channels), maxHeads)
		keys := make([]string, n)
		for i, c := range channels[:n] {
			keys[i] = b.keys.head(c)
		}
		gets = append(gets, p.MGet(ctx, keys...))
		channels = channels[n:]
	}
	return gets
}

func (b *Backend) parseHeads(channels []string, gets []*goredis.SliceCmd, incarnation dchannel.ID) ([]dchannel.Head, error) {
	heads := make([]dchannel.Head, 0, len(channels))
	for _, get := range gets {
		values, err := get.Result()
		if err != nil {
			return nil, err
		}
		for _, v := range values {
			h := dchannel.Head{Incarnation: incarnation, Keep: time.Duration(b.ttl.head) * time.Millisecond}
			if text, ok := v.(string); ok {
				if e, err := entry.Parse(bytesOf(text)); err != nil {
					// The core takes it for no log; an append is refused.
					b.foreign("head", channels[len(heads)], err)
				} else {
					h.Position, h.ID, h.Closed = e.Position, e.ID, e.Closed
				}
			}
			heads = append(heads, h)
		}
	}
	if len(heads) != len(channels) {
		return nil, fmt.Errorf("%d answers for %d heads", len(heads), len(channels))
	}
	return heads, nil
}

// parseStreamEntry reads one element of XRANGE's answer: [id, [field, value, ...]].
func parseStreamEntry(raw any) (id string, e dchannel.Entry, err error) {
	pair, _ := raw.([]any)
	if len(pair) != 2 {
		return "", e, fmt.Errorf("%w: not an id and fields", entry.ErrForeign)
	}
	id, _ = pair[0].(string)
	fields, _ := pair[1].([]any)
	if len(fields) != 4 || fields[0] != "h" || fields[2] != "d" {
		return id, e, fmt.Errorf("%w: not the fields h and d", entry.ErrForeign)
	}
	header, _ := fields[1].(string)
	if e, err = entry.Parse(bytesOf(header)); err != nil {
		return id, e, err
	}
	if data, _ := fields[3].(string); !e.Closed {
		e.Data = bytesOf(data)
	}
	if epoch, seq, _ := strings.Cut(id, "-"); epoch != strconv.FormatUint(e.Epoch, 10) || seq != strconv.FormatUint(e.Seq, 10) {
		return id, e, fmt.Errorf("%w: it is at another entry's place", entry.ErrForeign)
	}
	return id, e, nil
}

func parseID(id *dchannel.ID, text string) bool { return entry.ParseID(id, bytesOf(text)) }

// bytesOf returns s without a copy. go-redis makes a string of each payload that it
// reads, used by nobody else; an Entry's Data is read-only for ever, so it may be one.
func bytesOf(s string) []byte { return unsafe.Slice(unsafe.StringData(s), len(s)) }
