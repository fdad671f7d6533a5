package nats

import (
	"context"
	"errors"
	"slices"

	natsgo "github.com/nats-io/nats.go"

	"github.com/dchannel/dchannel"
)

const (
	// headsAtOnce is how many channels one request asks for: the server answers at
	// most 1,024 subjects, and two are ours.
	headsAtOnce = 1000
	// headBytes bounds one answer, which carries payloads. Far below what makes
	// the server take a client for too slow (64 MiB).
	headBytes = 8 << 20
)

var errNoIncarnation = errors.New("nats: the stream has no incarnation")

// Heads implements [dchannel.Backend].
//
// A direct get cannot leave payloads out, and so asking for the last message of
// every channel would carry all of them every few seconds. So it is asked only
// for what has come since the last time, and not even that when the stream's last
// number is the same.
func (b *Backend) Heads(ctx context.Context, channels []string) (heads []dchannel.Head, err error) {
	cs := make([]*channel, len(channels))
	for i, name := range channels {
		cs[i] = b.remembered(name)
	}
	err = b.retryMissing(ctx, func() error {
		tails, incarnation, err := b.tails(ctx, cs...)
		if err != nil {
			return err
		}
		now := b.now()
		heads = make([]dchannel.Head, len(tails))
		for i, t := range tails {
			heads[i] = t.head(now, incarnation)
		}
		return nil
	})
	return heads, err
}

// readTail returns a channel's tail as the server has it.
func (b *Backend) readTail(ctx context.Context, c *channel) (tail, error) {
	c.invalidate()
	tails, _, err := b.tails(ctx, c)
	if err != nil {
		return tail{}, err
	}
	return tails[0], nil
}

// tails returns the ends of the channels' subjects, and the incarnation that they
// were read under.
func (b *Backend) tails(ctx context.Context, cs ...*channel) ([]tail, dchannel.ID, error) {
	life := b.life.Load()
	out := make([]tail, len(cs))
	// What is not known at all is asked for first: that tells what is still valid
	// of the rest, too.
	var unknown, rest []int
	for i, c := range cs {
		if c.basis(life).upTo == 0 {
			unknown = append(unknown, i)
		} else {
			rest = append(rest, i)
		}
	}
	var o overview
	for {
		chunk := unknown[:min(len(unknown), headsAtOnce)]
		unknown = unknown[len(chunk):]
		incarnation := o.incarnation
		var err error
		if o, err = b.readTails(ctx, cs, chunk, out, life, basis{}, 0); err != nil {
			return nil, o.incarnation, err
		}
		if incarnation != o.incarnation && incarnation != (dchannel.ID{}) {
			return b.tails(ctx, cs...) // what was read before is of another stream
		}
		// Now that the overview is known: whatever was remembered under another
		// one has to be read too.
		known := rest[:0]
		for _, i := range rest {
			t, ok := cs[i].valid(o, life, b.now())
			if out[i] = t; ok {
				known = append(known, i)
			} else {
				unknown = append(unknown, i)
			}
		}
		if rest = known; len(unknown) == 0 {
			break
		}
	}
	again := false
	for len(rest) > 0 {
		chunk := rest[:min(len(rest), headsAtOnce)]
		rest = rest[len(chunk):]
		from := basis{upTo: o.upTo, removal: o.removal, incarnation: o.incarnation}
		for _, i := range chunk {
			from.upTo = min(from.upTo, cs[i].basis(life).upTo)
		}
		if from.upTo >= o.upTo {
			continue // nothing was added to the stream since
		}
		if from.upTo == 0 {
			again = true // forgotten meanwhile
			continue
		}
		now, err := b.readTails(ctx, cs, chunk, out, life, from, o.upTo)
		if err != nil {
			return nil, o.incarnation, err
		}
		again = again || now.removal != o.removal
	}
	if again {
		return b.tails(ctx, cs...)
	}
	return out, o.incarnation, nil
}

// readTails asks for the ends of the channels cs[i], i in chunk. With a basis it asks only
// for what is newer, and what does not come is as it was.
func (b *Backend) readTails(ctx context.Context, cs []*channel, chunk []int, out []tail, life uint64, from basis, known uint64) (overview, error) {
	at := make(map[string]int, len(chunk))
	left := make([]string, 0, len(chunk)+2)
	for _, i := range chunk {
		s := b.names.log + token(cs[i].name)
		at[s] = i
		left = append(left, s)
	}
	delta := from.upTo > 0
	var all overview
	got := make(map[string]tail, len(chunk))
	for first := true; first || all.cut; first = false {
		o, err := b.look(ctx, from, known, left)
		if err != nil {
			return o, err
		}
		if all.upTo == 0 || o.upTo < all.upTo {
			all.upTo = o.upTo
		}
		all.incarnation, all.cut = o.incarnation, o.cut && len(o.answers) > 0
		all.removal = max(all.removal, o.removal)
		for _, m := range o.answers {
			subject := header(m, headerSubject)
			i, ok := at[subject]
			if !ok {
				continue
			}
			r, err := decode(m)
			t := r.tail()
			if err != nil {
				b.foreign(m, err)
				if t, err = b.below(ctx, cs[i], r.place); err != nil {
					return o, err
				}
			}
			got[subject] = t
		}
		if all.cut { // the rest by another request
			left = slices.DeleteFunc(left, func(s string) bool { _, ok := got[s]; return ok })
		}
	}
	if delta && all.removal != from.removal {
		return all, nil // void: the caller begins anew
	}
	basis := basis{upTo: all.upTo, removal: all.removal, incarnation: all.incarnation}
	for s, i := range at {
		t, ok := got[s]
		if delta && !ok {
			t = out[i]
		}
		out[i] = cs[i].set(t, life, basis)
	}
	return all, nil
}

// below returns the tail when the last message is foreign: the last entry of ours,
// and the place of that message, which an append must expect.
func (b *Backend) below(ctx context.Context, c *channel, place uint64) (tail, error) {
	t := tail{}
	req := getRequest{Next: b.names.log + token(c.name), Seq: 1, Batch: pageMessages, MaxBytes: pageBytes}
	err := b.scan(ctx, req, nil, place, func(r record) bool {
		if r.Seq > 0 {
			t = r.tail()
		}
		t.place = r.place
		return true
	})
	t.place = max(t.place, place)
	return t, err
}

// overview is what one look at the stream tells.
type overview struct {
	incarnation dchannel.ID
	removal     uint64 // place of the newest note of a removal
	upTo        uint64 // the stream's last place at the time
	cut         bool   // not all answers fitted
	answers     []*natsgo.Msg
}

// look asks for the incarnation, the newest removal and the subjects' last messages,
// in the state of one moment. With a basis, only subjects with news since answer; the
// stream is known to have come as far as known.
func (b *Backend) look(ctx context.Context, from basis, known uint64, subjects []string) (o overview, err error) {
	bound := b.memory.bound()
	all := getRequest{Last: append([]string{b.names.incarnation, b.names.removed}, subjects...), MaxBytes: headBytes}
	if from.upTo == 0 {
		for try := 0; ; try++ {
			o, err = b.overviewOf(ctx, b.startGet(all), bound, false)
			if err != errBehind { //nolint:errorlint // its own
				return o, err
			}
			if err := b.behind(ctx, try, bound); err != nil {
				return o, err
			}
		}
	}
	all.Last, all.Seq = all.Last[1:], from.upTo+1
	if o, err = b.overviewOf(ctx, b.startGet(all), bound, true); err != nil {
		return o, err
	}
	o.incarnation = from.incarnation
	if o.removal == 0 {
		o.removal = from.removal
	}
	// Without an answer the server does not say up to where it has looked. That is
	// at least what was known before, unless another replica answered.
	if o.upTo == 0 {
		o.upTo = from.upTo
		if b.memory.single() {
			o.upTo = known
		}
	}
	return o, nil
}

func (b *Backend) overviewOf(ctx context.Context, c *call, bound uint64, delta bool) (o overview, err error) {
	answers, err := b.getAnswers(ctx, c)
	if err != nil {
		return o, err
	}
	var id dchannel.ID
	var ok bool
	for _, m := range answers {
		switch header(m, headerSubject) {
		case b.names.incarnation:
			id, ok = decodeIncarnation(m.Data)
		case b.names.removed:
			o.removal = number(m, headerSequence)
		case "":
			o.upTo, o.cut = number(m, headerUpTo), number(m, headerPending) > 0
		default:
			o.answers = append(o.answers, m)
		}
	}
	if delta {
		return o, nil
	}
	if !ok {
		b.verified.Store(false)
		return o, errNoIncarnation
	}
	var changed bool
	if o.incarnation, changed, err = b.memory.judge(id, bound, o.upTo); changed {
		b.changed()
	}
	return o, err
}
