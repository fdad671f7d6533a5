package memory

import (
	"fmt"
	"math"
	"sync"
	"weak"

	"github.com/dchannel/dchannel"
)

// slot is what the store holds for one channel: its log, if there is one, and its
// subscriptions.
type slot struct {
	store *Store
	shard *shard
	name  string

	mu      sync.Mutex
	epoch   uint64 // 0: there is no log
	seq     uint64
	last    dchannel.ID
	lastAt  int64 // when the last entry was accepted
	closed  bool
	endsAt  int64 // when the log as a whole expires
	records int   // in the entries, the marker not counted
	entries ring
	subs    []*subscription

	// forgot is when the newest of those entries was accepted that were here and
	// are not any more: a retry that began before it may have been one of them.
	forgot int64
	gone   bool // no longer in the map: look again
}

// append adds f and pushes it. since is when the first attempt began, 0 if this is
// the first.
func (s *Store) append(channel string, f dchannel.Frame, since int64, force bool) (dchannel.Position, error) {
	if f.Count < 1 {
		return dchannel.Position{}, fmt.Errorf("%w: a frame of %d records, at least 1 is needed", dchannel.ErrRefused, f.Count)
	}
	sl, err := s.enter(channel, force)
	if err != nil {
		return dchannel.Position{}, err
	}
	now := s.now()
	sl.expire(now)
	if since != 0 {
		if pos, err := sl.earlier(f.ID, since); err != nil || pos.Seq != 0 {
			s.leave(sl)
			return pos, err
		}
	}
	if sl.closed {
		sl.mu.Unlock()
		return dchannel.Position{}, dchannel.ErrChanClosed
	}
	sl.endsAt = now + s.idleExpiry
	sl.add(now, dchannel.Entry{Count: f.Count, ID: f.ID, Data: f.Data})
	for sl.records-sl.entries.at(0).Count >= s.maxRecords {
		sl.trim()
	}
	pos := dchannel.Position{Epoch: sl.epoch, Seq: sl.seq}
	sl.mu.Unlock()
	return pos, nil
}

// markClosed appends the marker and pushes it.
func (s *Store) markClosed(channel string, id dchannel.ID, keep int64, force bool) (dchannel.Position, error) {
	sl, err := s.enter(channel, force)
	if err != nil {
		return dchannel.Position{}, err
	}
	defer s.leave(sl)
	now := s.now()
	sl.expire(now)
	if !sl.closed {
		sl.endsAt = now + keep
		sl.add(now, dchannel.Entry{Count: 1, ID: id, Closed: true})
		s.sweepBy(sl.deadline())
	}
	return dchannel.Position{Epoch: sl.epoch, Seq: sl.seq}, nil
}

// read returns entries behind after.
func (s *Store) read(channel string, after dchannel.Position, limit int, force bool) (dchannel.Page, error) {
	sl, none, err := s.find(channel, force)
	if err != nil {
		return dchannel.Page{}, err
	}
	s.shard(channel).calls.Add(1)
	if sl == nil {
		return dchannel.Page{Head: none}, nil
	}
	defer s.leave(sl)
	sl.expire(s.now())
	from := 0
	if after.Epoch == sl.epoch {
		from = sl.entries.after(after.Seq)
	}
	to, size := from, 0
	for ; to < sl.entries.n; to++ {
		size += len(sl.entries.at(to).Data)
		if size > limit && to > from {
			break
		}
	}
	page := dchannel.Page{Head: sl.head()}
	if to > from {
		page.Entries = make([]dchannel.Entry, to-from)
		for i := range page.Entries {
			page.Entries[i] = *sl.entries.at(from + i)
		}
	}
	return page, nil
}

// heads returns the heads of all channels.
func (s *Store) heads(channels []string, force bool) ([]dchannel.Head, error) {
	if !force && s.gate.Load() {
		return nil, errPaused
	}
	heads := make([]dchannel.Head, len(channels))
	now := s.now()
	for i, channel := range channels {
		sl, none, err := s.find(channel, force)
		if err != nil {
			return nil, err
		}
		if sl == nil {
			heads[i] = none
			continue
		}
		sl.expire(now)
		heads[i] = sl.head()
		s.leave(sl)
	}
	s.shards[0].calls.Add(1)
	return heads, nil
}

// remove ends channel's log.
func (s *Store) remove(channel string, force bool) error {
	sl, err := s.enter(channel, force)
	if err != nil {
		return err
	}
	defer s.leave(sl)
	sl.expire(s.now())
	sl.end()
	return nil
}

// add completes e, makes it the log's last entry and pushes it. A log is begun if
// there is none.
func (sl *slot) add(now int64, e dchannel.Entry) {
	if sl.epoch == 0 {
		sl.epoch = sl.store.nextEpoch()
	}
	sl.seq += uint64(e.Count)
	e.Epoch, e.Seq, e.Prev, e.Time = sl.epoch, sl.seq, sl.last, now
	sl.last, sl.lastAt = e.ID, now
	if e.Closed {
		sl.closed = true
	} else {
		sl.records += e.Count
	}
	sl.entries.push(e)
	if sl.entries.n == 1 { // else the timer is set for an older one
		sl.store.sweepBy(sl.deadline())
	}
	for _, sub := range sl.subs {
		sub.push(e)
	}
}

// earlier looks for a former append of id: its position, or none because it surely
// never happened, or ErrUncertain.
func (sl *slot) earlier(id dchannel.ID, since int64) (dchannel.Position, error) {
	for i := sl.entries.n - 1; i >= 0; i-- { // to the end: since is a guess, IDs are not
		if e := sl.entries.at(i); e.ID == id {
			return e.Position, nil
		}
	}
	if sl.forgot >= since {
		return dchannel.Position{}, fmt.Errorf("%w: the channel's entries of that time are no longer held", dchannel.ErrForgotten)
	}
	return dchannel.Position{}, nil
}

// expire drops what is too old. Each method calls it first, so that nobody sees
// when the sweep came.
func (sl *slot) expire(now int64) {
	if sl.epoch == 0 {
		return
	}
	if now > sl.endsAt {
		sl.end()
		return
	}
	if sl.closed {
		return
	}
	for sl.entries.n > 0 && now-sl.entries.at(0).Time > sl.store.maxAge {
		sl.trim()
	}
}

// deadline returns when expire will next have something to do.
func (sl *slot) deadline() int64 {
	switch {
	case sl.epoch == 0 && len(sl.subs) > 0, sl.epoch == 0 && sl.forgot == 0:
		return math.MaxInt64
	case sl.epoch == 0:
		return sl.forgot + sl.store.maxAge + 1
	case sl.closed || sl.entries.n == 0:
		return sl.endsAt + 1
	}
	return min(sl.entries.at(0).Time+sl.store.maxAge, sl.endsAt) + 1
}

// trim drops the oldest entry.
func (sl *slot) trim() {
	e := sl.entries.at(0)
	sl.records -= e.Count
	sl.forgot = max(sl.forgot, e.Time)
	sl.entries.popFirst()
}

// end drops the log.
func (sl *slot) end() {
	if sl.epoch == 0 {
		return
	}
	sl.forgot = max(sl.forgot, sl.lastAt)
	sl.epoch, sl.seq, sl.last, sl.lastAt = 0, 0, dchannel.ID{}, 0
	sl.closed, sl.endsAt, sl.records, sl.entries = false, 0, 0, ring{}
	sl.store.sweepBy(sl.deadline())
}

// rewind takes the last n entries back, as far as they are retained.
func (sl *slot) rewind(n int) {
	for ; n > 0 && sl.entries.n > 0; n-- {
		e := *sl.entries.at(sl.entries.n - 1)
		sl.entries.popLast()
		sl.forgot = max(sl.forgot, e.Time)
		sl.seq, sl.last = e.First()-1, e.Prev
		if e.Closed {
			sl.closed = false
			sl.endsAt = e.Time + sl.store.idleExpiry
		} else {
			sl.records -= e.Count
		}
	}
	if sl.seq == 0 {
		sl.end()
	}
}

func (sl *slot) head() dchannel.Head {
	h := sl.store.noHead()
	h.Epoch, h.Seq, h.ID, h.Closed = sl.epoch, sl.seq, sl.last, sl.closed
	if sl.closed {
		h.Keep = duration(sl.endsAt - sl.lastAt)
	}
	return h
}

// noHead is the head of a channel without a log. Only under a lock of the channel, or
// its shard, and with the gate down since.
func (s *Store) noHead() dchannel.Head {
	return dchannel.Head{Incarnation: s.incarnation, Keep: duration(s.idleExpiry)}
}

// weakly returns a function that calls f as long as v is in use elsewhere, so that
// a pending timer does not hold a store that nobody can reach any more.
func weakly[T any](v *T, f func(*T)) func() {
	p := weak.Make(v)
	return func() {
		if v := p.Value(); v != nil {
			f(v)
		}
	}
}
