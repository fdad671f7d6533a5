package dchannel

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"time"
)

// feed is the upstream of one channel in this process: the one subscription, and
// the ring of recent nodes in which the handles are cursors.
//
// Pushes are hints, the log is the truth: a pushed entry is taken if it is the very
// next one, and everything else is read from the backend until the log and the feed
// agree again.
type feed struct {
	s     *session
	local *local
	name  string
	gone  chan struct{} // closed when the subscription is, or will never be

	// users counts handles and those who wait to become one; kept under s.mu.
	users int

	mu      sync.Mutex
	phase   phase
	conn    State     // the push, as the driver sees it
	since   time.Time // of phase or conn, whichever changed last
	reason  error     // why it is not live
	trk     tracker
	lapsed  time.Time // since when pushes may have been missed; zero: not so
	heard   time.Time // when the last entry came, or the attachment
	recheck bool      // Resync came while behind
	recent  *recent
	pending []Entry // pushed while behind
	spilled bool    // pending was full
	sub     Subscription
	cancel  context.CancelFunc // of the goroutine that attaches or reads, if any
	changed chan struct{}      // closed when phase or conn changes; made on demand

	ring     []node // ring[off:] are the nodes base, base+1, …
	off      int
	base     uint64
	bytes    int
	limit    int
	onRing   int32 // handles whose cursor is in the ring
	handles  []*handle
	sleeping []*handle

	reconnects uint64
}

type phase uint8

const (
	attaching phase = iota
	live            // at the head, taking pushes
	behind          // reading; pushes wait in pending
	ended           // the close marker has been taken
	failed          // for good: reason says why
	released        // nobody uses it any more
)

const (
	// attempt bounds one call to the backend, so that a stuck connection is given
	// up and the next try may find a better one.
	attempt    = 4 * time.Second
	backoffMin = 5 * time.Millisecond
	backoffMax = time.Second
	pageBytes  = 1 << 20
	maxPending = 4096
	// stubborn is how often a reader looks for a pushed entry that the log does not
	// show before it takes the push for a mistake.
	stubborn = 20
	day      = 24 * time.Hour
)

// Entry implements Sink.
func (f *feed) Entry(e Entry) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch f.phase {
	case live:
		f.accept(e)
	case attaching, behind:
		f.wait(e)
	case ended, failed, released:
	}
}

// Resync implements Sink.
func (f *feed) Resync(reason error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch f.phase {
	case live:
		f.lapse()
		f.reason = reason
		f.setPhase(behind)
		f.s.heads.ask(f)
	case attaching, behind:
		f.lapse()
		f.recheck = true
	case ended, failed, released:
	}
}

// State implements Sink.
func (f *feed) State(s State, reason error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.phase > behind {
		return
	}
	switch s {
	case StateFailed:
		f.fail(reason)
		return
	case StateInterrupted:
		f.lapse()
		f.reason = reason
	case StateLive:
		if f.conn == StateInterrupted {
			f.reconnects++
		}
	}
	if s != f.conn {
		f.conn = s
		f.change()
	}
}

// lapse notes that pushes may be missing from now on. f.mu is held, here and below.
func (f *feed) lapse() {
	if f.lapsed.IsZero() {
		f.lapsed = time.Now()
	}
}

func (f *feed) setPhase(p phase) {
	f.phase = p
	if p == live {
		f.lapsed = time.Time{}
	}
	f.change()
}

func (f *feed) change() {
	f.since = time.Now()
	if f.changed != nil {
		close(f.changed)
		f.changed = nil
	}
}

// ready: a handle may attach here, or will never.
func (f *feed) ready() bool {
	return f.phase == live && f.conn != StateInterrupted || f.phase >= ended
}

func (f *feed) fail(err error) {
	f.reason = err
	f.finish(failed)
}

// finish ends the feed: nothing follows. The subscription goes with it.
func (f *feed) finish(p phase) {
	f.setPhase(p)
	f.pending = nil
	if f.cancel != nil {
		f.cancel()
	}
	sub := f.sub
	f.sub = nil
	f.wake()
	handles := append([]*handle{}, f.handles...)
	for _, h := range handles {
		h.finished(p)
	}
	// Aside: Close waits for a running sink method, and this may be one.
	go func() {
		f.unsubscribe(sub)
		f.s.over(f)
		for _, h := range handles {
			h.free()
		}
	}()
}

// wait keeps a pushed entry until the reader is through.
func (f *feed) wait(e Entry) {
	if len(f.pending) >= maxPending {
		f.pending, f.spilled = nil, true
	}
	f.pending = append(f.pending, e)
}

// accept takes a pushed entry while live.
func (f *feed) accept(e Entry) {
	v := f.trk.judge(e)
	if v == isOther && f.trk.Epoch == 0 && e.First() == 1 {
		v = isNext // the first log of a channel that had none
	}
	switch v {
	case isNext:
		f.take(e)
	case isOld:
		if _, known := f.recent.find(e.ID); !known {
			// From before our time, most likely. But a log that was rewound and
			// written anew looks like this too, so look when it is a recent number.
			if seq, ok := f.recent.below(e.Epoch); ok && e.Seq > seq {
				f.catchUp(e)
			}
		}
	case isAhead, isFork, isOther:
		f.catchUp(e)
	}
}

// take puts the next entry into the ring.
func (f *feed) take(e Entry) {
	f.trk.cursor = cursorAt(e)
	if !f.duplicate(e) {
		f.put(node{entry: e})
	}
}

// duplicate reports whether e was taken before, and remembers it if not.
func (f *feed) duplicate(e Entry) bool {
	if _, ok := f.recent.find(e.ID); ok {
		return true
	}
	if f.recent == nil {
		f.recent = new(recent)
	}
	f.recent.add(cursorAt(e))
	return false
}

// rewind is where to go on in a log that was rewound: behind all that may have been
// taken, as far as is remembered.
func (f *feed) rewind(h Head) uint64 {
	if seq, ok := f.recent.below(h.Epoch); ok {
		return min(seq, h.Seq)
	}
	return h.Seq
}

func (f *feed) put(n node) {
	f.heard = time.Now()
	if n.entry.Closed {
		defer f.finish(ended)
	}
	if n.refs = f.onRing; n.refs == 0 {
		f.base++
	} else {
		f.ring = append(f.ring, n)
		f.bytes += n.size()
		if f.bytes > f.limit {
			f.evict()
		}
	}
	f.wake()
}

func (f *feed) wake() {
	for i, h := range f.sleeping {
		h.asleep = false
		h.rouse()
		f.sleeping[i] = nil
	}
	f.sleeping = f.sleeping[:0]
}

// pop drops the oldest node.
func (f *feed) pop() {
	f.bytes -= f.ring[f.off].size()
	f.ring[f.off] = node{}
	f.off++
	f.base++
	switch {
	case f.off == len(f.ring):
		f.off, f.ring = 0, f.ring[:0]
		if cap(f.ring) > 16 {
			f.ring = nil
		}
	case f.off > 1024 && f.off > len(f.ring)/2:
		f.ring = append(f.ring[:0:0], f.ring[f.off:]...)
		f.off = 0
	}
}

// evict makes room by dropping the oldest nodes. Handles that had not taken them
// fall out of the ring and will read from the backend.
func (f *feed) evict() {
	known := f.trk.incarnation
	for f.bytes > f.limit*3/4 && len(f.ring)-f.off > 1 {
		if g := f.ring[f.off].gap; g != nil && g.Count == 0 {
			// Who misses this node must learn otherwise that state was lost: no
			// incarnation will equal this one.
			known = NewID()
		}
		f.pop()
	}
	for _, h := range f.handles {
		if h.inRing && h.cur < f.base {
			h.trk = &tracker{incarnation: known}
			f.unring(h)
		}
	}
}

// unring takes h's cursor out of the ring.
func (f *feed) unring(h *handle) {
	h.inRing = false
	f.onRing--
	from := max(h.cur, f.base)
	for i := f.off + int(from-f.base); i < len(f.ring); i++ {
		f.ring[i].refs--
	}
	f.sweep()
}

// enring puts h's cursor at node cur.
func (f *feed) enring(h *handle, cur uint64) {
	h.inRing, h.cur = true, cur
	f.onRing++
	for i := f.off + int(cur-f.base); i < len(f.ring); i++ {
		f.ring[i].refs++
	}
}

func (f *feed) sweep() {
	for len(f.ring) > f.off && f.ring[f.off].refs <= 0 {
		f.pop()
	}
}

// end is the index behind the newest node.
func (f *feed) end() uint64 { return f.base + uint64(len(f.ring)-f.off) }

// attach subscribes and learns the head; on its own goroutine, until it succeeds,
// fails for good, or nobody wants it any more. It begins when the channel's feed
// before this one is gone, if there was one.
func (f *feed) attach(ctx context.Context, before <-chan struct{}) {
	subscribed := false
	defer func() {
		if !subscribed {
			f.leftServer()
		}
	}()
	if before != nil {
		select {
		case <-before:
		case <-ctx.Done():
			<-before // soon: closing waits for no server, and who comes next waits for us
			return
		}
	}
	var b backoff
	for {
		call, done := context.WithTimeout(ctx, attempt)
		sub, err := f.s.backend.Subscribe(call, f.name, f)
		done()
		f.mu.Lock()
		if f.phase != attaching {
			f.mu.Unlock()
			if err == nil {
				sub.Close()
			}
			return
		}
		if err == nil {
			f.cancel()
			f.sub, f.conn, f.cancel = sub, StateLive, nil
			subscribed = true
			f.s.heads.ask(f)
			f.mu.Unlock()
			return
		}
		f.reason = err
		if final(err) {
			f.fail(err)
			f.mu.Unlock()
			return
		}
		f.mu.Unlock()
		if !b.sleep(ctx) {
			return
		}
	}
}

// headed takes the head that heads.ask brought.
func (f *feed) headed(h Head, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	at := h.Position == f.trk.Position && h.ID == f.trk.id && h.Incarnation == f.trk.incarnation
	switch {
	case f.phase > behind:
	case errors.Is(err, ErrBackendClosed), err != nil && f.phase == attaching && final(err):
		f.fail(err)
	case err != nil:
		f.reason = err
		f.s.heads.ask(f)
	case f.phase == attaching:
		f.trk.cursor = cursor{h.Position, h.ID}
		f.trk.incarnation = h.Incarnation
		f.heard = time.Now()
		if h.Closed {
			f.finish(ended)
			return
		}
		f.settle()
	case f.phase == behind && at && f.cancel == nil:
		f.settle()
	case f.phase == behind || !at && f.phase == live && f.stale(h):
		f.read()
	}
}

// stale reports, while live, whether h shows that the feed missed something: a head
// that is merely older than the newest push does not.
func (f *feed) stale(h Head) bool {
	return h.Incarnation != f.trk.incarnation || h.Epoch != f.trk.Epoch || h.Seq > f.trk.Seq ||
		h.Seq == f.trk.Seq && h.ID != f.trk.id
}

// settle goes live if the entries that wait continue at the cursor, and reads on if
// they do not.
func (f *feed) settle() {
	if f.recheck || f.spilled {
		f.recheck, f.spilled = false, false
		f.read()
		return
	}
	waiting := f.pending
	f.pending = nil
	f.setPhase(live)
	f.reason = nil
	for i, e := range waiting {
		f.accept(e)
		if f.phase == behind {
			f.pending = append(f.pending, waiting[i+1:]...)
			return
		}
		if f.phase != live {
			return
		}
	}
}

// catchUp reads what is missing below e, which waits.
func (f *feed) catchUp(e Entry) {
	f.wait(e)
	f.read()
}

// read starts the goroutine that reads until the feed is at the head. Not twice.
func (f *feed) read() {
	if f.phase != behind {
		f.setPhase(behind)
	}
	if f.cancel == nil {
		ctx, cancel := context.WithCancel(f.s.ctx)
		f.cancel = cancel
		go f.reader(ctx)
	}
}

func (f *feed) reader(ctx context.Context) {
	select { // only so many at once, for a server that just came back
	case f.s.readers <- struct{}{}:
		defer func() { <-f.s.readers }()
	case <-ctx.Done():
		return
	}
	var b, younger backoff
	for tries := 0; ; {
		f.mu.Lock()
		after := f.trk.Position
		f.mu.Unlock()
		call, done := context.WithTimeout(ctx, attempt)
		p, err := f.s.backend.Read(call, f.name, after, pageBytes)
		done()
		f.mu.Lock()
		if f.phase != behind {
			f.mu.Unlock()
			return
		}
		if err != nil {
			f.reason = err
			if errors.Is(err, ErrBackendClosed) {
				f.fail(err)
			}
			f.mu.Unlock()
			if !b.sleep(ctx) {
				return
			}
			continue
		}
		b = backoff{}
		atHead := f.trk.page(f.name, p, f.calm(p.Head), f.rewind, f.duplicate, f.put)
		if f.phase != behind {
			f.mu.Unlock()
			return
		}
		progress := atHead && f.merge()
		if atHead && (len(f.pending) == 0 || tries >= stubborn) {
			f.pending = nil
			f.cancel()
			f.cancel = nil
			f.settle()
			f.mu.Unlock()
			return
		}
		f.mu.Unlock()
		// At the head, and yet an entry was pushed that is not there: the read was
		// older than the push. That passes.
		if atHead && !progress {
			if tries++; !younger.sleep(ctx) {
				return
			}
		}
	}
}

// merge takes the waiting entries that continue at the cursor and drops those that
// the log has brought already.
func (f *feed) merge() (progress bool) {
	var rest []Entry
	for _, e := range f.pending {
		switch v := f.trk.judge(e); {
		case f.phase != behind:
			return true
		case v == isNext, v == isOther && f.trk.Epoch == 0 && e.First() == 1:
			f.take(e)
			progress = true
		case v == isOld && e.Seq < f.trk.Seq, v == isOld && e.ID == f.trk.id:
		default:
			rest = append(rest, e)
		}
	}
	f.pending = rest
	return progress
}

// calm: a new log in place of the one we knew is no loss.
func (f *feed) calm(h Head) bool {
	if f.lapsed.IsZero() {
		return true // every push of the old one came
	}
	keep := h.Keep
	if keep <= 0 {
		keep = day
	}
	// The connection was down, but too short for a log to come and go; and there was
	// no log to miss the end of, or it had been idle for so long that it had to go.
	return time.Since(f.lapsed) < keep && (f.trk.Epoch == 0 || time.Since(f.heard) >= keep)
}

// final reports that trying again is of no use.
func final(err error) bool {
	return !errors.Is(err, ErrUnavailable) && !errors.Is(err, ErrUncertain) &&
		!errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, context.Canceled)
}

// backoff waits longer each time, with jitter.
type backoff struct{ d time.Duration }

// sleep reports false when ctx ended first.
func (b *backoff) sleep(ctx context.Context) bool {
	b.d = min(max(2*b.d, backoffMin), backoffMax)
	t := time.NewTimer(b.d/2 + rand.N(b.d/2)) //nolint:gosec // jitter
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
