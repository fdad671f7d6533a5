package dchannel

import (
	"context"
	"fmt"
	"time"

	"github.com/dchannel/dchannel/internal/frame"
)

// spot is a handle's place in the channel.
type spot struct {
	// Under the feed's lock:
	inRing bool
	asleep bool
	cur    uint64 // index of the next node, while inRing

	// Held by the reader's turn, once there is a reader:
	end cursor   // behind the last node that was taken
	trk *tracker // while reading from the backend

	at place // of the last record delivered
}

// reader is what a handle needs to return messages, apart from it because many a
// handle only publishes, or waits for the close: it is made by the first Listen.
type reader struct {
	*handle
	turn   chan struct{} // held by the one Listen that reads; 1 buffered
	roused chan struct{} // 1 buffered: look again

	// Held by turn:
	batch  []node // taken from the ring, or read
	popped int    // how many of them have been taken out
	frame  frame.Reader
	entry  Entry    // the frame's
	seq    uint64   // of the last record read from frame
	skip   Position // records of its epoch up to it were delivered before
	final  error    // what every further Listen returns
	pause  backoff  // of reads that failed
}

// reader returns the handle's, and makes it if there is none yet.
func (h *handle) reader() *reader {
	if r := h.reading.Load(); r != nil {
		return r
	}
	h.reading.CompareAndSwap(nil, &reader{
		handle: h, turn: make(chan struct{}, 1), roused: make(chan struct{}, 1),
	})
	return h.reading.Load()
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
func (h *handle) rouse() {
	if r := h.reading.Load(); r != nil {
		select {
		case r.roused <- struct{}{}:
		default:
		}
	}
}

// next returns the next message.
func (r *reader) next(ctx context.Context) (m Message, err error) {
	if err := ctx.Err(); err != nil {
		return m, err
	}
	select {
	case r.turn <- struct{}{}:
	default:
		select {
		case r.turn <- struct{}{}:
		case <-ctx.Done():
			return m, ctx.Err()
		}
	}
	defer func() { <-r.turn }()
	if r.final != nil && !r.detached.Load() {
		return m, r.final
	}
	f, err := r.attach(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return m, ctx.Err()
		}
		return m, r.wrap("listen", err)
	}
	for {
		if r.detached.Load() {
			r.rouse() // the next one in turn
			return m, r.wrap("listen", ErrDetached)
		}
		if m, ok, err := r.pop(); ok || err != nil {
			return m, err
		}
		switch r.take(f) {
		case taken:
			continue
		case outOfRing:
			err = r.readOn(ctx, f)
		case nothing:
			select {
			case <-r.roused:
			case <-ctx.Done():
				err = ctx.Err()
			}
		case noMore:
			r.final = r.wrap("listen", f.verdict())
			err = r.final
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
func (r *reader) pop() (m Message, ok bool, err error) {
	for {
		for r.frame.More() {
			rec, err := r.frame.Next()
			if err != nil {
				return m, false, r.corrupt(err)
			}
			r.seq++
			if r.seq <= r.skip.Seq && r.entry.Epoch == r.skip.Epoch {
				continue
			}
			if r.seq > r.entry.Seq {
				r.frame = frame.Reader{}
				break
			}
			at := Position{r.entry.Epoch, r.seq}
			r.at.store(at)
			r.received.Add(1)
			return Message{Position: at, Time: time.UnixMilli(r.entry.Time), rec: rec, codec: r.o.codec}, true, nil
		}
		if r.seq < r.entry.Seq {
			return m, false, r.corrupt(fmt.Errorf("%w: records are missing", frame.ErrCorrupt))
		}
		if r.popped == len(r.batch) {
			r.popped, r.batch = 0, r.batch[:0]
			return m, false, nil
		}
		n := r.batch[r.popped]
		r.batch[r.popped] = node{}
		r.popped++
		switch {
		case n.gap != nil:
			if r.lost.Add(n.gap.Count); n.gap.Count == 0 {
				r.unknown.Add(1)
			}
			gap := *n.gap // each listener's own
			return m, false, &gap
		case n.entry.Closed:
			r.final = r.wrap("listen", ErrChanClosed)
			r.at.store(n.entry.Position)
			r.sawClose()
			return m, false, r.final
		}
		r.entry, r.seq = n.entry, n.entry.First()-1
		if r.frame, err = frame.Open(n.entry.Data); err != nil {
			return m, false, r.corrupt(err)
		}
	}
}

// corrupt skips the rest of the present frame and says so.
func (r *reader) corrupt(cause error) error {
	r.frame = frame.Reader{}
	after := r.seq
	n := r.entry.Seq - after
	r.seq = r.entry.Seq
	r.lost.Add(n)
	return r.wrap("listen", fmt.Errorf("%w: %d messages after %v: %w",
		ErrCodec, n, Position{r.entry.Epoch, after}, cause))
}

type took uint8

const (
	taken took = iota
	nothing
	noMore
	outOfRing
)

// take moves nodes from the ring into the batch.
func (r *reader) take(f *feed) took {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case r.detached.Load():
		return nothing
	case !r.inRing:
		return outOfRing
	case r.cur == f.end():
		if f.phase > behind {
			return noMore
		}
		if cap(r.batch) > keepNodes {
			r.batch = nil
		}
		if !r.asleep {
			r.asleep = true
			f.sleeping = append(f.sleeping, r.handle)
		}
		return nothing
	}
	if n := min(int(f.end()-r.cur), takeNodes); cap(r.batch) < n {
		r.batch = make([]node, 0, n)
	}
	bytes := 0
	for r.cur < f.end() && len(r.batch) < takeNodes && bytes < takeBytes {
		n := &f.ring[f.off+int(r.cur-f.base)]
		bytes += n.size()
		r.cur++
		n.refs--
		r.push(*n)
	}
	f.sweep()
	return taken
}

// push appends a node to the batch, unless the handle had it before it came back
// to the ring.
func (r *reader) push(n node) {
	switch {
	case n.gap != nil:
		if n.gap.Next.Epoch == r.end.Epoch && n.gap.Next.Seq <= r.end.Seq && r.end.Seq > 0 {
			return
		}
		r.end = cursor{Position: n.gap.Next}
		if r.end.Seq > 0 {
			r.end.Seq--
		}
	case n.entry.Epoch == r.end.Epoch && n.entry.Seq <= r.end.Seq:
		return
	default:
		r.startAt(n.entry)
		r.end = cursorAt(n.entry)
	}
	r.batch = append(r.batch, n)
}

// startAt notes that the handle is in the middle of e, as After can put it there.
func (r *reader) startAt(e Entry) {
	if e.Epoch == r.end.Epoch && e.First() <= r.end.Seq {
		r.skip = r.end.Position
	}
}

// readOn reads a page from the backend, for a handle that is not in the ring, and
// goes back to the ring if it can.
func (r *reader) readOn(ctx context.Context, f *feed) error {
	call, done := context.WithTimeout(ctx, attempt)
	p, err := r.backend.Read(call, r.name, r.end.Position, lagPage)
	done()
	if err != nil {
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case final(err):
			return r.wrap("listen", err)
		case !r.pause.sleep(ctx):
			return ctx.Err()
		}
		return nil
	}
	t := r.trk
	t.cursor = r.end
	if len(p.Entries) > 0 {
		r.startAt(p.Entries[0])
	}
	emit := func(n node) { r.batch = append(r.batch, n) }
	if r.closedElsewhere(f, p.Head, emit) {
		return nil
	}
	atHead := t.page(r.name, p, r.end.Epoch == 0, func(h Head) uint64 { return h.Seq }, f.repeated, emit)
	r.end = t.cursor

	f.mu.Lock()
	back := r.detached.Load() || f.rejoin(r.handle)
	if !back && atHead && len(r.batch) == 0 && f.phase == live {
		// The log has a head that the feed does not know.
		f.lapse()
		f.read()
	}
	f.mu.Unlock()
	if back || !atHead || len(r.batch) > 0 {
		r.pause = backoff{}
	} else if !r.pause.sleep(ctx) {
		return ctx.Err()
	}
	return nil
}

// closedElsewhere ends a handle that was slow for so long that the closed log, whose
// end the feed has seen, is gone: nothing of a next log may reach it.
func (r *reader) closedElsewhere(f *feed, head Head, emit func(node)) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	end := f.trk.Position
	if f.phase != ended || head.Epoch == end.Epoch {
		return false
	}
	gap := &LostError{Channel: r.name, After: r.end.Position, Next: end, Cause: causeRetention}
	if r.end.Epoch == end.Epoch {
		gap.Count = end.Seq - 1 - r.end.Seq
	}
	if gap.Count > 0 || r.end.Epoch != end.Epoch {
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
