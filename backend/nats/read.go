package nats

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	natsgo "github.com/nats-io/nats.go"

	"github.com/dchannel/dchannel"
)

// getRequest is the body of a direct get: see JSApiMsgGetRequest in the server.
type getRequest struct {
	Seq      uint64     `json:"seq,omitempty"`
	Next     string     `json:"next_by_subj,omitempty"`
	Batch    int        `json:"batch,omitempty"`
	MaxBytes int        `json:"max_bytes,omitempty"`
	Time     *time.Time `json:"start_time,omitempty"`
	Last     []string   `json:"multi_last,omitempty"`
}

const (
	pageMessages = 1000
	pageBytes    = 4 << 20
)

// Read implements [dchannel.Backend].
func (b *Backend) Read(ctx context.Context, channel string, after dchannel.Position, limit int) (page dchannel.Page, err error) {
	err = b.retryMissing(ctx, func() (err error) {
		page, err = b.read(ctx, b.channel(channel), after, max(limit, 1))
		return err
	})
	return page, err
}

// read asks for the head and the first page in one trip.
func (b *Backend) read(ctx context.Context, c *channel, after dchannel.Position, limit int) (page dchannel.Page, err error) {
	life := b.life.Load()
	req := getRequest{Next: b.names.log + token(c.name), Seq: 1, Batch: pageMessages, MaxBytes: min(limit, pageBytes)}
	m, marked := c.before(after)
	if marked {
		// A mark of an earlier connection is read again, to see that it is still
		// there: the server may have come back without it.
		req.Seq = m.place
		if m.life == life {
			req.Seq++
		}
	}
	first := b.startGet(req)
	var last record
	tails, incarnation, err := b.tails(ctx, c)
	if err != nil {
		b.wire.drop(first)
		return page, err
	}
	t, size := tails[0], 0
	lost := false
	err = b.scan(ctx, req, first, t.place, func(r record) bool {
		if marked && m.life != life {
			marked = false
			if lost = r.place != m.place || r.ID != m.id; lost {
				return false
			}
		}
		if r.Seq == 0 { // foreign
			t.place = max(t.place, r.place)
			return true
		}
		if r.place > t.place {
			t = r.tail()
		}
		c.learn(r, life, b.stride())
		if r.Epoch > t.Epoch || r.Epoch == t.Epoch && (r.Epoch != after.Epoch || r.Seq > after.Seq) {
			page.Entries = append(page.Entries, r.Entry)
			size += len(r.Data)
		}
		last = r
		return size < limit
	})
	if err != nil {
		return page, err
	}
	if lost || marked && m.life != life && last.place == 0 {
		c.dropMarks()
		return b.read(ctx, c, after, limit)
	}
	if last.place > 0 {
		c.ended(last, life)
	}
	page.Head = t.head(b.now(), incarnation)
	// An older log's leftovers stand before the log, and what is read of one that
	// has had its time is not there.
	keep := page.Entries[:0]
	for _, e := range page.Entries {
		if e.Epoch == page.Head.Epoch {
			keep = append(keep, e)
		}
	}
	page.Entries = keep
	return page, nil
}

// scan reads a channel on from req, at least to a place that is known to be there,
// until visit says that it is enough. first is the call for the first page, if it
// was started already.
func (b *Backend) scan(ctx context.Context, req getRequest, first *call, to uint64, visit func(record) bool) error {
	at := uint64(0)
	for try := 0; ; {
		if first == nil {
			first = b.startGet(req)
		}
		records, more, err := b.pageOf(ctx, first)
		if first = nil; err != nil {
			return err
		}
		for _, r := range records {
			at = r.place
			if !visit(r) {
				return nil
			}
		}
		if at > 0 {
			req.Seq, req.Time = at+1, nil
		}
		if more && len(records) > 0 {
			continue
		}
		// A place that is known and not there was removed meanwhile, or is yet to
		// come to the replica that has answered.
		if max(at, req.Seq-min(req.Seq, 1)) >= to || b.memory.single() {
			return nil
		}
		if err := b.behind(ctx, try, 0); err != nil {
			return err
		}
		if try++; try > 100 {
			return nil
		}
	}
}

// firstAt returns the first entry of a channel at or behind a place.
func (b *Backend) firstAt(ctx context.Context, name string, place uint64) (record, bool, error) {
	records, _, err := b.page(ctx, getRequest{Next: b.names.log + token(name), Seq: place, Batch: 1})
	if err != nil || len(records) == 0 {
		return record{}, false, err
	}
	return records[0], true, nil
}

// page reads records by one batch request. more says that there are others behind.
func (b *Backend) page(ctx context.Context, req getRequest) ([]record, bool, error) {
	return b.pageOf(ctx, b.startGet(req))
}

func (b *Backend) pageOf(ctx context.Context, c *call) ([]record, bool, error) {
	answers, err := b.getAnswers(ctx, c)
	if err != nil || answers == nil {
		return nil, false, err
	}
	records := make([]record, 0, len(answers)-1)
	for _, m := range answers[:len(answers)-1] {
		r, err := decode(m)
		if err != nil {
			b.foreign(m, err)
			r = record{place: r.place} // its place counts, for who goes on behind it
		}
		records = append(records, r)
	}
	return records, number(answers[len(answers)-1], headerPending) > 0, nil
}

func (b *Backend) startGet(req getRequest) *call {
	m := natsgo.NewMsg("$JS.API.DIRECT.GET." + b.names.stream)
	m.Data, _ = json.Marshal(req) // strings and numbers: it cannot fail
	return b.wire.start(m, batch)
}

// getAnswers returns what a direct get answered, with the closing message; nil when
// there is nothing.
func (b *Backend) getAnswers(ctx context.Context, c *call) ([]*natsgo.Msg, error) {
	answers, _, err := b.wire.wait(ctx, c)
	if err != nil {
		return nil, err
	}
	end := answers[len(answers)-1]
	switch s := status(end); s {
	case "204":
		return answers, nil
	case "404":
		return nil, nil
	default:
		return nil, fmt.Errorf("%w: nats: direct get: %s %s", dchannel.ErrUnavailable, s, header(end, "Description"))
	}
}

func (b *Backend) foreign(m *natsgo.Msg, err error) {
	b.opt.logger.Warn("nats: a message that is not dchannel's", "subject", m.Subject, "error", err)
}
