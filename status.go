package dchannel

import (
	"sync/atomic"
	"time"
)

// Status describes a handle at one moment.
type Status struct {
	// Channel is the channel's name.
	Channel string
	// Attached: the handle listens. It stays true over interruptions.
	Attached bool
	// State is the condition of the channel's push in this process: detached
	// (0), live, interrupted or failed.
	State State
	// Since is when State came about; zero while detached.
	Since time.Time
	// Reason is why State is not live, or why the last attempt to attach failed.
	Reason error
	// CatchingUp: messages are being read from what the backend retains.
	CatchingUp bool
	// Closed: the channel is closed, and this handle knows.
	Closed bool
	// Position is that of the last message that Listen returned, or of the
	// attachment.
	Position Position
	// Head is the newest position that this process knows.
	Head Position
	// Lag is how many messages lie between the two; 0 when they are in different
	// epochs.
	Lag uint64
	// Handles is how many handles of the channel are attached in this process.
	Handles int
	// Reconnects counts how often the push resumed after an interruption.
	Reconnects uint64

	// Published counts this handle's messages that the backend accepted.
	Published uint64
	// Received counts the messages that this handle returned.
	Received uint64
	// Lost counts the messages that were reported missing, where the number is
	// known, and LostUnknown how often it was not.
	Lost, LostUnknown uint64
}

func (h *handle) status() Status {
	s := Status{
		Channel:     h.name,
		Closed:      h.closed.Load(),
		Published:   h.published.Load(),
		Received:    h.received.Load(),
		Lost:        h.lost.Load(),
		LostUnknown: h.unknown.Load(),
	}
	h.mu.Lock()
	f := h.f
	s.Reason = h.attachErr
	if h.invalid != nil {
		s.Reason = h.invalid
	}
	h.mu.Unlock()
	if f == nil || h.detached.Load() {
		return s
	}
	s.Position = h.at.load()
	f.mu.Lock()
	defer f.mu.Unlock()
	s.Attached = f.phase < failed
	s.Since, s.Reason = f.since, f.reason
	s.Head = f.trk.Position
	s.Handles = len(f.handles)
	s.Reconnects = f.reconnects
	s.CatchingUp = f.phase == behind || !h.inRing
	switch {
	case f.phase == failed:
		s.State = StateFailed
	case f.conn == StateInterrupted:
		s.State = StateInterrupted
	default:
		s.State, s.Reason = StateLive, nil
	}
	if (s.Position.Epoch == s.Head.Epoch || s.Position.Epoch == 0) && s.Head.Seq > s.Position.Seq {
		s.Lag = s.Head.Seq - s.Position.Seq
	}
	return s
}

// place is a Position that one goroutine writes and others read.
type place struct{ epoch, seq atomic.Uint64 }

func (p *place) store(at Position) {
	if p.epoch.Load() != at.Epoch {
		// In between, readers see the beginning of the new epoch.
		p.seq.Store(0)
		p.epoch.Store(at.Epoch)
	}
	p.seq.Store(at.Seq)
}

func (p *place) load() Position {
	for {
		at := Position{p.epoch.Load(), p.seq.Load()}
		if p.epoch.Load() == at.Epoch {
			return at
		}
	}
}
