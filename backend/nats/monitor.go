package nats

import (
	"errors"
	"fmt"
	"time"

	natsgo "github.com/nats-io/nats.go"

	"github.com/dchannel/dchannel"
)

// run starts what works in the background: four goroutines, whatever the number of
// channels. startMu is held.
func (b *Backend) run() {
	b.wire = newWire(b.conn)
	b.work.Go(func() { b.wire.queue.run(b.wire.stop) })
	b.work.Go(b.monitor)
	b.work.Go(b.dispatch)
	b.work.Go(b.trimmer)
}

// monitor follows the connection's condition, and asks for signs of life.
//
// It does not touch the connection's handlers, which are the user's. Status events
// can be dropped when ten of them wait, but they are only a reason to look: what is
// looked at, status and number of reconnects, is never older than the event.
func (b *Backend) monitor() {
	events := b.conn.StatusChanged()
	defer b.conn.RemoveStatusListener(events)
	m := monitor{b: b}
	sub, err := b.conn.Subscribe(b.wire.prefix+"*", b.wire.answer)
	if err == nil {
		err = sub.SetPendingLimits(-1, -1) // requests bound their answers themselves
	}
	if err != nil { // a closed connection: the look says so
		b.wire.setDown(err, err)
	}
	defer func() { _ = sub.Unsubscribe() }() // only a closed connection fails, and has none
	m.look()
	close(b.looked)
	probe := time.NewTicker(b.opt.probeInterval)
	defer probe.Stop()
	swept := time.Now()
	for {
		select {
		case <-b.closed:
			return
		case <-events:
			m.look()
		case <-probe.C:
			m.probe()
			b.compareLocks()
			if time.Since(swept) > time.Minute {
				swept = time.Now()
				b.sweep(10 * time.Minute)
			}
		}
	}
}

type monitor struct {
	b          *Backend
	up         bool
	reconnects uint64
}

// look compares the connection with what is known of it.
func (m *monitor) look() {
	conn := m.b.conn
	status, reconnects := conn.Status(), conn.Stats().Reconnects
	switch status {
	case natsgo.CONNECTED:
		if m.up && m.reconnects == reconnects {
			return
		}
		m.wentDown(errCut)
		m.reconnects = reconnects
		m.probeWith(m.cameUp)
	case natsgo.CLOSED:
		m.closed()
	case natsgo.DRAINING_SUBS, natsgo.DRAINING_PUBS:
		// The caller is about to close it. Requests fail by themselves.
	default:
		err := conn.LastError()
		if err == nil {
			err = errCut
		}
		m.wentDown(err)
	}
}

// probe asks for a sign of life on a connection that seems fine. The client's own
// pings take minutes to notice that nobody answers.
func (m *monitor) probe() {
	m.look()
	if m.up {
		m.probeWith(func() {})
	}
}

func (m *monitor) probeWith(ok func()) {
	err := m.b.conn.FlushTimeout(m.b.opt.probeTimeout)
	switch {
	case err == nil:
		ok()
	case m.b.isClosed() != nil:
	case errors.Is(err, natsgo.ErrTimeout):
		m.wentDown(fmt.Errorf("nats: no sign of life in %v", m.b.opt.probeTimeout))
		// What was sent and not answered is lost with the old connection, and a
		// closed connection says no here: its status event is on the way.
		_ = m.b.conn.ForceReconnect()
	default: // cut meanwhile: its event is on the way
		m.wentDown(errCut)
	}
}

// wentDown fails what is under way and tells the subscriptions.
func (m *monitor) wentDown(reason error) {
	b := m.b
	// reason is for people only: it may be an older error of the connection.
	b.wire.setDown(fmt.Errorf("%w: %v", errNotConnected, reason), fmt.Errorf("%w: %v", errCut, reason)) //nolint:errorlint // see above
	b.verified.Store(false)
	if !m.up {
		return
	}
	m.up = false
	b.life.Add(1)
	for _, s := range b.subscriptions() {
		s.state(dchannel.StateInterrupted, reason)
	}
}

// cameUp is called when a ping was answered on the new connection, so that the
// server has the subscriptions again: the client sends them before anything else.
func (m *monitor) cameUp() {
	b := m.b
	m.up = true
	b.life.Add(1)
	b.noteMaxPayload(b.conn.MaxPayload())
	b.wire.setDown(nil, nil)
	reason := errors.New("nats: connected")
	for _, s := range b.subscriptions() {
		s.state(dchannel.StateLive, reason)
		s.resync(reason)
	}
}

// closed is called when the connection was closed, by its owner or because the
// server refused the credentials twice. It never comes back.
func (m *monitor) closed() {
	reason := m.b.conn.LastError()
	if reason == nil {
		reason = natsgo.ErrConnectionClosed
	}
	err := fmt.Errorf("%w: %w: %w", dchannel.ErrBackendClosed, natsgo.ErrConnectionClosed, reason)
	m.b.shut(err)
}
