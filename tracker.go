package dchannel

// This file is the law: what may follow what. Everything that is delivered goes
// through it, pushed or read, so that a server's or a driver's fault becomes an
// explicit gap and never a hole that nobody sees.

// node is a step of a channel as listeners see it: an entry, a gap, or the end.
type node struct {
	entry Entry      // its Data holds the records; or the close marker
	gap   *LostError // not nil: messages are missing here
	refs  int32      // handles that have yet to take it; kept by feed
}

// size is what the node counts in the ring's bound. A fixed share stands for the
// node itself, so that empty messages are bounded too.
func (n *node) size() int { return len(n.entry.Data) + 128 }

// cursor is a listener's place: the last record that it has taken, and the ID of
// the entry that record ended (zero: not known).
type cursor struct {
	Position
	id ID
}

func cursorAt(e Entry) cursor { return cursor{e.Position, e.ID} }

type verdict uint8

const (
	isNext  verdict = iota // e continues at the cursor
	isOld                  // all of e is at or before the cursor
	isAhead                // records are missing in between
	isFork                 // the numbers fit, the chain of IDs does not
	isOther                // another log
)

// judge says how e stands to the cursor.
func (c cursor) judge(e Entry) verdict {
	switch {
	case e.Epoch != c.Epoch:
		return isOther
	case e.Seq < c.Seq:
		return isOld
	case e.Seq == c.Seq:
		if c.id != (ID{}) && e.ID != c.id {
			return isFork
		}
		return isOld
	case e.First() > c.Seq+1:
		return isAhead
	case e.First() == c.Seq+1 && c.id != (ID{}) && e.Prev != c.id:
		return isFork
	}
	return isNext
}

// tracker follows a log by reading it.
type tracker struct {
	cursor
	// fresh: the cursor is before everything; what is gone already is no loss.
	fresh bool
	// incarnation is the backend memory that the cursor belongs to.
	incarnation ID
	// target is the head of an earlier page. What a later read does not bring of the
	// records up to it has gone for good; of those above it one cannot say so, for
	// they may be younger than that read.
	target uint64
}

const (
	causeRetention = "older than what the backend retains"
	causeState     = "the backend lost its state, or may have lost the end of it"
	causeReplaced  = "the log ended and a new one began meanwhile"
	causeFork      = "the log was rewound and written anew"
)

// page takes what was read behind the cursor, in order, and emits what a listener
// gets. It reports whether the cursor is at the head now; if not, read again.
//
// calm says that the log may have ended in the normal course of things: then a new
// epoch is no loss. rewind returns where to go on in a log that is not the one we
// knew: the last sequence number that we surely had, or so. duplicate reports an
// entry that was delivered before under another number.
func (t *tracker) page(name string, p Page, calm bool, rewind func(Head) uint64, duplicate func(Entry) bool, emit func(node)) (atHead bool) {
	h := p.Head
	gap := func(n uint64, next Position, cause string) {
		if next.Epoch == 0 {
			next = Position{} // there is no log to go on in yet
		}
		emit(node{gap: &LostError{Channel: name, Count: n, After: t.Position, Next: next, Cause: cause}})
	}
	stateLost := t.incarnation != (ID{}) && h.Incarnation != (ID{}) && h.Incarnation != t.incarnation
	t.incarnation = h.Incarnation
	switch {
	case t.fresh:
		t.cursor = cursor{Position: Position{Epoch: h.Epoch}}
		switch {
		case len(p.Entries) > 0:
			t.Seq = p.Entries[0].First() - 1
		case t.target == 0 && h.Seq > 0: // they may have come since the read: again
			t.target = h.Seq
			return false
		case h.Closed && t.target == h.Seq:
			t.Seq = h.Seq - 1
		default:
			t.Seq = t.target
		}
		t.fresh = false
	case h.Epoch != t.Epoch:
		if stateLost {
			gap(0, Position{h.Epoch, 1}, causeState)
		} else if !calm {
			gap(0, Position{h.Epoch, 1}, causeReplaced)
		}
		t.cursor, t.target = cursor{Position: Position{Epoch: h.Epoch}}, 0
		if stateLost && len(p.Entries) > 0 {
			t.Seq = p.Entries[0].First() - 1 // what is gone below is part of that loss
		}
	case h.Seq < t.Seq, h.Seq == t.Seq && t.id != ID{} && h.ID != t.id,
		len(p.Entries) > 0 && t.judge(p.Entries[0]) == isFork:
		cause := causeFork
		if stateLost {
			cause = causeState
		}
		to := rewind(h)
		gap(0, Position{h.Epoch, to + 1}, cause)
		t.cursor, t.target = cursor{Position: Position{h.Epoch, to}}, 0
		return to == h.Seq
	case stateLost:
		// The log goes on where we are, as far as one can see; what was accepted
		// behind its present end and lost cannot be seen.
		gap(0, Position{t.Epoch, t.Seq + 1}, causeState)
	}

	took := false
	for _, e := range p.Entries {
		switch t.judge(e) {
		case isOld, isOther:
			continue
		case isFork: // inside one page: the backend contradicts itself
			gap(0, Position{e.Epoch, e.First()}, causeFork)
		case isAhead:
			gap(e.First()-t.Seq-1, Position{e.Epoch, e.First()}, causeRetention)
		case isNext:
		}
		took = true
		t.cursor = cursorAt(e)
		if !duplicate(e) {
			emit(node{entry: e})
		}
	}
	switch {
	case t.Seq >= h.Seq:
		t.target = 0
		return true
	case took:
		return false
	case t.target == 0:
		t.target = h.Seq
		return false
	}
	// The second read in a row without anything below the head of the first.
	n, end := t.target-t.Seq, t.target == h.Seq
	if end && h.Closed {
		n--
	}
	if n > 0 {
		gap(n, Position{h.Epoch, t.target + 1}, causeRetention)
	}
	t.cursor = cursor{Position: Position{h.Epoch, t.target}}
	t.target = 0
	if !end {
		return false
	}
	t.id = h.ID
	if h.Closed {
		emit(node{entry: Entry{Position: h.Position, Count: 1, ID: h.ID, Closed: true}})
	}
	return true
}

// recent remembers the IDs of the last entries that were taken, so that an append
// which the store repeated (it had forgotten the first one) is delivered once.
type recent struct {
	ids [16]cursor
	n   uint
}

func (r *recent) add(c cursor) {
	r.ids[r.n%uint(len(r.ids))] = c
	r.n++
}

func (r *recent) find(id ID) (Position, bool) {
	if r != nil {
		for i := range min(r.n, uint(len(r.ids))) {
			if r.ids[i].id == id {
				return r.ids[i].Position, true
			}
		}
	}
	return Position{}, false
}

// below returns the last sequence number before all that is remembered of epoch.
func (r *recent) below(epoch uint64) (seq uint64, ok bool) {
	if r == nil {
		return 0, false
	}
	for i := range min(r.n, uint(len(r.ids))) {
		if c := r.ids[i]; c.Epoch == epoch && (!ok || c.Seq-1 < seq) {
			seq, ok = c.Seq-1, true
		}
	}
	return seq, ok
}
