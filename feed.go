package dchannel

import (
	"context"
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
