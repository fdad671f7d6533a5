package dchannel

import (
	"context"
	"errors"
	"time"
)

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
