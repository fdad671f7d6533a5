package dchannel

import (
	"time"
)

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
