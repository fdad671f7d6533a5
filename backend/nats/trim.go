package nats

import (
	"context"
	"encoding/json"
	"math/rand/v2"
	"time"

	natsgo "github.com/nats-io/nats.go"
)

// trim is a subject whose old messages are to go: those below a place, or, if that is
// 0, those older than the retention.
type trim struct {
	subject string
	below   uint64
}

// trimLater has old entries of c deleted now and then, while it is appended to. Their
// TTL is longer than the retention: see entryLife.
func (b *Backend) trimLater(c *channel, place uint64, began bool) {
	pause := max(b.opt.retention/8, time.Second)
	pause += rand.N(pause / 4) // not all processes at once
	c.mu.Lock()
	due := !c.trimAt.IsZero() && time.Now().After(c.trimAt)
	if due || c.trimAt.IsZero() {
		c.trimAt = time.Now().Add(pause)
	}
	c.mu.Unlock()
	t := trim{subject: b.names.log + token(c.name)}
	if began {
		t.below = place // what an earlier log has left
	}
	if due || began {
		select {
		case b.trims <- t:
		default: // the next append that is due asks again
		}
	}
}

// trimmer deletes, one channel after the other.
func (b *Backend) trimmer() {
	for {
		select {
		case <-b.closed:
			return
		case t := <-b.trims:
			ctx, cancel := context.WithTimeout(context.Background(), answerTimeout)
			if err := b.trim(ctx, t); err != nil && b.isClosed() == nil {
				b.opt.logger.Info("nats: old entries were not deleted", "subject", t.subject, "error", err)
			}
			cancel()
		}
	}
}

func (b *Backend) trim(ctx context.Context, t trim) error {
	if t.below == 0 {
		since := b.now().Add(-b.opt.retention).UTC()
		records, _, err := b.page(ctx, getRequest{Next: t.subject, Time: &since, Batch: 1})
		if err != nil || len(records) == 0 {
			return err
		}
		t.below = records[0].place
	}
	return b.purge(ctx, t.subject, t.below)
}

// purge deletes a subject's messages below a place; with 0, all of them.
func (b *Backend) purge(ctx context.Context, subject string, below uint64) error {
	m := natsgo.NewMsg("$JS.API.STREAM.PURGE." + b.names.stream)
	var err error
	if m.Data, err = json.Marshal(struct {
		Filter string `json:"filter"`
		Seq    uint64 `json:"seq,omitempty"`
	}{subject, below}); err != nil {
		return err
	}
	_, err = b.publish(ctx, m) // its answer has the same form as far as errors go
	return err
}
