package nats

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"time"

	natsgo "github.com/nats-io/nats.go"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/internal/entry"
)

// patience bounds how long one call tries again while others are faster. A
// replicated stream whose replica is behind looks the same.
const patience = 10 * time.Second

// append puts e at the end of the log: a compare-and-set on the last message of the
// channel's subject. What is known of the end may be old, and then the server says
// no and it is read anew; so nothing here depends on a read being fresh, and of two
// attempts for one entry, at most one is accepted, whenever they arrive.
func (b *Backend) append(ctx context.Context, name string, e dchannel.Entry, age, keep time.Duration) (dchannel.Position, error) {
	c := b.channel(name)
	began := time.Now()
	var pos dchannel.Position
	fresh := false
	search := search{since: b.now().Add(-age - searchSlack)}
	for try := 0; ; try++ {
		err := b.retryMissing(ctx, func() (err error) {
			pos, fresh, err = b.tryAppend(ctx, c, e, age, keep, fresh, &search)
			return err
		})
		switch {
		case err == nil:
			c.settle(e.ID)
			return pos, nil
		case conflict(err) || errors.Is(err, errLookAgain):
		default:
			return pos, err
		}
		if conflict(err) && time.Since(began) > patience {
			return pos, mapError(errContended, false)
		}
		fresh = true
		if !errors.Is(err, errLookAgain) {
			// The others need one trip each: wait about one, then more.
			pause := time.Duration(rand.Int64N(int64(200*time.Microsecond) << min(try, 6)))
			select {
			case <-time.After(pause):
			case <-ctx.Done():
				return pos, ctx.Err()
			case <-b.closed:
				return pos, b.closeErr
			}
		}
	}
}

// errLookAgain says that the answer must not rest on what was remembered.
var errLookAgain = errors.New("nats: to be asked again")

func (b *Backend) tryAppend(ctx context.Context, c *channel, e dchannel.Entry, age, keep time.Duration, fresh bool, s *search) (dchannel.Position, bool, error) {
	life := b.life.Load()
	t, known := c.known(life)
	if fresh || !known {
		var err error
		if t, err = b.readTail(ctx, c); err != nil {
			return dchannel.Position{}, true, err
		}
		fresh = true
	}
	now := b.now()
	if age > 0 {
		pos, found, err := b.find(ctx, c, e.ID, t, s)
		if err != nil || found {
			return pos, fresh, err
		}
	}
	if t.log(now) && t.closed {
		if !fresh { // it may have been removed since
			return dchannel.Position{}, true, errLookAgain
		}
		if e.Closed {
			return t.Position, fresh, nil
		}
		return dchannel.Position{}, fresh, fmt.Errorf("%w: nats", dchannel.ErrChanClosed)
	}
	begin := !t.log(now)
	if begin && !fresh && t.place > 0 { // was it extended since?
		return dchannel.Position{}, true, errLookAgain
	}
	if begin {
		c.mu.Lock()
		last := c.epoch
		c.mu.Unlock()
		e.Epoch = max(uint64(now.UnixMicro()), t.Epoch+1, last+1)
		e.Seq = uint64(e.Count)
	} else {
		e.Epoch, e.Seq, e.Prev = t.Epoch, t.Seq+uint64(e.Count), t.id
	}
	e.Time = now.UnixMilli()

	m := natsgo.NewMsg(b.names.log + token(c.name))
	ttl := b.opt.entryLife()
	counts := ttl
	if e.Closed {
		// The marker outlives all that stands below it: an entry that was the
		// last one after it would be an open log again.
		counts = time.Duration(seconds(keep)) * time.Second
		m.Header[headerKeep] = []string{strconv.FormatInt(seconds(keep), 10) + "s"}
		ttl = max(ttl, keep) + 2*time.Second
	}
	m.Header[headerTTL] = []string{strconv.FormatInt(seconds(ttl), 10) + "s"}
	m.Header[headerExpect] = []string{strconv.FormatUint(t.place, 10)}
	m.Data = entry.Append(make([]byte, 0, len(e.Data)+overhead/2), e)

	place, err := b.publish(ctx, m)
	if err != nil {
		if isUncertain(err) && !begin {
			c.doubt(e.ID, e.Epoch)
		}
		c.invalidate()
		return dchannel.Position{}, true, err
	}
	b.memory.see(place)
	// By a clock that is right within a round trip; what is read is exact.
	c.learn(record{Entry: e, place: place, until: now.Add(counts), keep: counts}, life, b.stride())
	b.trimLater(c, place, begin && t.place > 0)
	return e.Position, fresh, nil
}

func isUncertain(err error) bool { return errors.Is(err, dchannel.ErrUncertain) }

// stride is how many entries are between two coarse marks.
func (b *Backend) stride() int { return max(1, b.opt.messages/coarseMarks) }

// publish sends m to the stream and returns its sequence number there. An error
// that leaves open whether it was taken is an ErrUncertain.
func (b *Backend) publish(ctx context.Context, m *natsgo.Msg) (place uint64, err error) {
	answers, sent, err := b.wire.roundTrip(ctx, m, one)
	if err != nil {
		if sent && !streamMissing(err) {
			return 0, mapError(err, true)
		}
		return 0, err
	}
	var ack struct {
		Error *apiError `json:"error"`
		Seq   uint64    `json:"seq"`
	}
	if err := json.Unmarshal(answers[0].Data, &ack); err != nil {
		return 0, fmt.Errorf("%w: nats: an answer that is not JSON: %w", dchannel.ErrUncertain, err)
	}
	if ack.Error != nil {
		return 0, ack.Error
	}
	return ack.Seq, nil
}

// searchSlack is how much earlier than a first attempt its entry is looked for: the
// server's clock is known from here to within a round trip.
const searchSlack = 2 * time.Second

// search is where to look for an entry that an earlier attempt may have left.
type search struct {
	since time.Time
	place uint64 // read up to here without finding it
}

// find looks for the entry of an earlier attempt, up to the tail t. Not found, and
// no error, is certain if the next append expects t.
func (b *Backend) find(ctx context.Context, c *channel, id dchannel.ID, t tail, s *search) (dchannel.Position, bool, error) {
	if t.id == id {
		return t.Position, true, nil
	}
	if pos, ok := c.byID(id, b.life.Load()); ok {
		return pos, true, nil
	}
	c.mu.Lock()
	epoch, doubt := c.doubtful[id]
	c.mu.Unlock()
	if doubt && epoch != t.Epoch {
		return dchannel.Position{}, false, fmt.Errorf("%w: nats: the log that it may have been in is gone", dchannel.ErrForgotten)
	}
	if t.place == 0 {
		return dchannel.Position{}, false, nil
	}
	req := getRequest{Next: b.names.log + token(c.name), Batch: pageMessages, MaxBytes: pageBytes}
	if s.place > 0 {
		req.Seq = s.place + 1
	} else {
		since := s.since.UTC()
		req.Time = &since
	}
	from := s.place
	var hit *record
	if s.place < t.place && !t.until.Add(-t.keep).Before(s.since) { // else all is older
		if err := b.scan(ctx, req, nil, t.place, func(r record) bool {
			if r.Seq > 0 && r.ID == id {
				hit = &r
			}
			return hit == nil
		}); err != nil {
			return dchannel.Position{}, false, err
		}
	}
	if hit != nil {
		return hit.Position, true, nil
	}
	s.place = max(s.place, t.place)
	// It is not among what is left. That says something only if nothing has been
	// dropped that came after the first attempt.
	oldest, found, err := b.firstAt(ctx, c.name, 1)
	if err != nil {
		return dchannel.Position{}, false, err
	}
	if !found || oldest.First() == 1 || oldest.place <= from || !time.UnixMilli(oldest.Time).After(s.since) {
		return dchannel.Position{}, false, nil
	}
	return dchannel.Position{}, false, fmt.Errorf("%w: nats: retention no longer has what was appended meanwhile", dchannel.ErrForgotten)
}
