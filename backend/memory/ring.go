package memory

import "github.com/dchannel/dchannel"

// ring is the queue of a log's retained entries. It lets go of what is taken out,
// and of its own memory when little is left in it.
type ring struct {
	buf   []dchannel.Entry // its length is 0 or a power of two
	start int              // where the oldest entry is
	n     int
}

const minRing = 8

// at returns the i-th entry, from the oldest.
func (r *ring) at(i int) *dchannel.Entry { return &r.buf[(r.start+i)&(len(r.buf)-1)] }

// push adds e as the newest entry.
func (r *ring) push(e dchannel.Entry) {
	if r.n == len(r.buf) {
		r.resize(max(minRing, 2*len(r.buf)))
	}
	r.n++
	*r.at(r.n - 1) = e
}

// popFirst takes the oldest entry out.
func (r *ring) popFirst() {
	*r.at(0) = dchannel.Entry{}
	r.start = (r.start + 1) & (len(r.buf) - 1)
	r.n--
	r.shrink()
}

// popLast takes the newest entry out.
func (r *ring) popLast() {
	*r.at(r.n - 1) = dchannel.Entry{}
	r.n--
	r.shrink()
}

// after returns how many entries end at or below seq.
func (r *ring) after(seq uint64) int {
	low, high := 0, r.n
	for low < high {
		if mid := (low + high) / 2; r.at(mid).Seq <= seq {
			low = mid + 1
		} else {
			high = mid
		}
	}
	return low
}

// shrink halves the memory at a quarter's use, so that a ring at a steady length
// is never copied.
func (r *ring) shrink() {
	switch {
	case r.n == 0:
		*r = ring{buf: r.buf}
		if len(r.buf) > minRing {
			r.buf = nil
		}
	case len(r.buf) > minRing && r.n <= len(r.buf)/4:
		r.resize(len(r.buf) / 2)
	}
}

func (r *ring) resize(size int) {
	buf := make([]dchannel.Entry, size)
	for i := range r.n {
		buf[i] = *r.at(i)
	}
	r.buf, r.start = buf, 0
}
