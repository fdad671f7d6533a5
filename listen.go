package dchannel

import (
	"context"
	"fmt"
	"time"

	"github.com/dchannel/dchannel/internal/frame"
)

// reader is a handle's place in the channel.
type reader struct {
	turn   chan struct{} // held by the one Listen that reads; 1 buffered
	roused chan struct{} // 1 buffered: look again

	// Under the feed's lock:
	inRing bool
	asleep bool
	cur    uint64 // index of the next node, while inRing

	// Held by turn:
	batch  []node // taken from the ring, or read
	popped int    // how many of them have been taken out
	frame  frame.Reader
	entry  Entry    // the frame's
	seq    uint64   // of the last record read from frame
	skip   Position // records of its epoch up to it were delivered before
	end    cursor   // behind the last node in batch
	trk    *tracker // while reading from the backend
	final  error    // what every further Listen returns
	pause  backoff  // of reads that failed

	at place // of the last record delivered
}

const (
	// A handle takes nodes from the ring in batches, so that a hundred listeners do
	// not fight for the ring's lock over every message.
	takeNodes = 64
	takeBytes = 64 << 10
	// keepNodes is how large a batch an idle handle holds on to.
	keepNodes = 8
	// lagPage is how much a handle that fell behind reads at a time.
	lagPage = 256 << 10
)

// rouse makes a sleeping reader look again.
func (r *reader) rouse() {
	select {
	case r.roused <- struct{}{}:
	default:
	}
}

// next returns the next message.
func (h *handle) next(ctx context.Context) (m Message, err error) {
	if err := ctx.Err(); err != nil {
		return m, err
	}
	select {
	case h.turn <- struct{}{}:
	default:
		select {
		case h.turn <- struct{}{}:
		case <-ctx.Done():
			return m, ctx.Err()
		}
	}
	defer func() { <-h.turn }()
	if h.final != nil && !h.detached.Load() {
		return m, h.final
	}
	f, err := h.attach(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return m, ctx.Err()
		}
		return m, h.wrap("listen", err)
	}
	for {
		if h.detached.Load() {
			h.rouse() // the next one in turn
			return m, h.wrap("listen", ErrDetached)
		}
		if m, ok, err := h.pop(); ok || err != nil {
			return m, err
		}
		switch h.take(f) {
		case taken:
			continue
		case outOfRing:
			err = h.readOn(ctx, f)
		case nothing:
			select {
			case <-h.roused:
			case <-ctx.Done():
				err = ctx.Err()
			}
		case noMore:
			h.final = h.wrap("listen", f.verdict())
			err = h.final
		}
		if err != nil {
			return m, err
		}
	}
}

// verdict is what a listener gets behind the last node of a feed that is over.
func (f *feed) verdict() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.phase == failed {
		return f.reason
	}
	return ErrChanClosed
}

// pop returns the next message of the batch; ok is false if there is none.
func (h *handle) pop() (m Message, ok bool, err error) {
	for {
		for h.frame.More() {
			rec, err := h.frame.Next()
			if err != nil {
				return m, false, h.corrupt(err)
			}
			h.seq++
			if h.seq <= h.skip.Seq && h.entry.Epoch == h.skip.Epoch {
				continue
			}
			if h.seq > h.entry.Seq {
				h.frame = frame.Reader{}
				break
			}
			at := Position{h.entry.Epoch, h.seq}
			h.at.store(at)
			h.received.Add(1)
			return Message{Position: at, Time: time.UnixMilli(h.entry.Time), rec: rec, codec: h.o.codec}, true, nil
		}
		if h.seq < h.entry.Seq {
			return m, false, h.corrupt(fmt.Errorf("%w: records are missing", frame.ErrCorrupt))
		}
		if h.popped == len(h.batch) {
			h.popped, h.batch = 0, h.batch[:0]
			if cap(h.batch) > keepNodes {
				h.batch = nil
			}
			return m, false, nil
		}
		n := h.batch[h.popped]
		h.batch[h.popped] = node{}
		h.popped++
		switch {
		case n.gap != nil:
			if h.lost.Add(n.gap.Count); n.gap.Count == 0 {
				h.unknown.Add(1)
			}
			gap := *n.gap // each listener's own
			return m, false, &gap
		case n.entry.Closed:
			h.final = h.wrap("listen", ErrChanClosed)
			h.at.store(n.entry.Position)
			h.sawClose()
			return m, false, h.final
		}
		h.entry, h.seq = n.entry, n.entry.First()-1
		if h.frame, err = frame.Open(n.entry.Data); err != nil {
			return m, false, h.corrupt(err)
		}
	}
}

// corrupt skips the rest of the present frame and says so.
func (h *handle) corrupt(cause error) error {
	h.frame = frame.Reader{}
	after := h.seq
	n := h.entry.Seq - after
	h.seq = h.entry.Seq
	h.lost.Add(n)
	return h.wrap("listen", fmt.Errorf("%w: %d messages after %v: %w",
		ErrCodec, n, Position{h.entry.Epoch, after}, cause))
}

type took uint8

const (
	taken took = iota
	nothing
	noMore
	outOfRing
)

// take moves nodes from the ring into the batch.
func (h *handle) take(f *feed) took {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case h.detached.Load():
		return nothing
	case !h.inRing:
		return outOfRing
	case h.cur == f.end():
		if f.phase > behind {
			return noMore
		}
		if !h.asleep {
			h.asleep = true
			f.sleeping = append(f.sleeping, h)
		}
		return nothing
	}
	bytes := 0
	for h.cur < f.end() && len(h.batch) < takeNodes && bytes < takeBytes {
		n := &f.ring[f.off+int(h.cur-f.base)]
		bytes += n.size()
		h.cur++
		n.refs--
		h.push(*n)
	}
	f.sweep()
	return taken
}

// push appends a node to the batch, unless the handle had it before it came back
// to the ring.
func (h *handle) push(n node) {
	switch {
	case n.gap != nil:
		if n.gap.Next.Epoch == h.end.Epoch && n.gap.Next.Seq <= h.end.Seq {
			return
		}
		h.end = cursor{Position: Position{n.gap.Next.Epoch, n.gap.Next.Seq - 1}}
	case n.entry.Epoch == h.end.Epoch && n.entry.Seq <= h.end.Seq:
		return
	default:
		h.startAt(n.entry)
		h.end = cursorAt(n.entry)
	}
	h.batch = append(h.batch, n)
}

// startAt notes that the handle is in the middle of e, as After can put it there.
func (h *handle) startAt(e Entry) {
	if e.Epoch == h.end.Epoch && e.First() <= h.end.Seq {
		h.skip = h.end.Position
	}
}

// readOn reads a page from the backend, for a handle that is not in the ring, and
// goes back to the ring if it can.
func (h *handle) readOn(ctx context.Context, f *feed) error {
	call, done := context.WithTimeout(ctx, attempt)
	p, err := h.backend.Read(call, h.name, h.end.Position, lagPage)
	done()
	if err != nil {
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case final(err):
			return h.wrap("listen", err)
		case !h.pause.sleep(ctx):
			return ctx.Err()
		}
		return nil
	}
	t := h.trk
	t.cursor = h.end
	if len(p.Entries) > 0 {
		h.startAt(p.Entries[0])
	}
	emit := func(n node) { h.batch = append(h.batch, n) }
	if h.closedElsewhere(f, p.Head, emit) {
		return nil
	}
	atHead := t.page(h.name, p, h.end.Epoch == 0, func(h Head) uint64 { return h.Seq }, f.repeated, emit)
	h.end = t.cursor

	f.mu.Lock()
	back := h.detached.Load() || f.rejoin(h)
	if !back && atHead && len(h.batch) == 0 && f.phase == live {
		// The log has a head that the feed does not know.
		f.lapse()
		f.read()
	}
	f.mu.Unlock()
	if back || !atHead || len(h.batch) > 0 {
		h.pause = backoff{}
	} else if !h.pause.sleep(ctx) {
		return ctx.Err()
	}
	return nil
}

// closedElsewhere ends a handle that was slow for so long that the closed log, whose
// end the feed has seen, is gone: nothing of a next log may reach it.
func (h *handle) closedElsewhere(f *feed, head Head, emit func(node)) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	end := f.trk.Position
	if f.phase != ended || head.Epoch == end.Epoch {
		return false
	}
	gap := &LostError{Channel: h.name, After: h.end.Position, Next: end, Cause: causeRetention}
	if h.end.Epoch == end.Epoch {
		gap.Count = end.Seq - 1 - h.end.Seq
	}
	if gap.Count > 0 || h.end.Epoch != end.Epoch {
		emit(node{gap: gap})
	}
	emit(node{entry: Entry{Position: end, Count: 1, Closed: true}})
	return true
}

// repeated reports an append that the store did twice: the feed had it earlier.
func (f *feed) repeated(e Entry) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	p, ok := f.recent.find(e.ID)
	return ok && p != e.Position && (p.Epoch != e.Epoch || p.Seq < e.Seq)
}

// rejoin puts h back into the ring if its place is there. f.mu is held.
func (f *feed) rejoin(h *handle) bool {
	if h.trk.fresh || h.end.Epoch != f.trk.Epoch || h.trk.incarnation != f.trk.incarnation {
		return false
	}
	if h.end.Seq >= f.trk.Seq {
		f.enring(h, f.end())
		h.trk = nil
		return true
	}
	for i, n := range f.ring[f.off:] {
		if n.gap != nil || n.entry.Epoch != h.end.Epoch || n.entry.Seq <= h.end.Seq {
			continue
		}
		if n.entry.First() > h.end.Seq+1 {
			return false
		}
		f.enring(h, f.base+uint64(i))
		h.trk = nil
		return true
	}
	return false
}

// Message is one message, as Next and Messages return it.
type Message struct {
	// Position is its place in the channel's order. A listener that stores it can go
	// on behind it after a restart, see After.
	Position Position
	// Time is when the backend accepted it, by the backend's clock.
	Time time.Time

	rec   frame.Record
	codec Codec
}

// Value returns what Listen would: a string, a []byte that belongs to the caller, or
// what the codec decodes.
func (m Message) Value() (any, error) {
	v, err := decode(m.codec, &m.rec)
	if err != nil {
		return nil, fmt.Errorf("dchannel: message %v: %w", m.Position, err)
	}
	return v, nil
}

// Decode stores the message in v, a pointer: a *string, a *[]byte, or what the codec
// accepts.
func (m Message) Decode(v any) error {
	if err := decodeTo(m.codec, &m.rec, v); err != nil {
		return fmt.Errorf("dchannel: message %v: %w", m.Position, err)
	}
	return nil
}

// Size returns the length of the encoded value in bytes.
func (m Message) Size() int { return len(m.rec.Payload) }

// AppendTo appends the encoded value to dst and returns the extended slice.
func (m Message) AppendTo(dst []byte) []byte { return append(dst, m.rec.Payload...) }
